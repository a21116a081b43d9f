//! The tables of RDPROTECT, WRPROTECT, VRPROTECT and ORPROTECT (SBC-4 5.13, 5.41, 5.36, 5.9): which tags a value of the
//! field has checked, of tuples from the medium and of tuples from the initiator.
//!
//! Functions of the field's value and of bits of the control mode page, without state. GRD_CHK, APP_CHK and REF_CHK are
//! 1 (VPD page 86), so where a table makes a check depend on one of them it is made.

use crate::volume::PiType;

/// Which tags are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Checks {
    /// LOGICAL BLOCK GUARD.
    pub guard: bool,
    /// LOGICAL BLOCK APPLICATION TAG, as far as it is known what it should be.
    pub app: bool,
    /// LOGICAL BLOCK REFERENCE TAG, as far as the type of protection defines it.
    pub reference: bool,
}

impl Checks {
    pub const NONE: Checks = Checks { guard: false, app: false, reference: false };
    pub const ALL: Checks = Checks { guard: true, app: true, reference: true };
}

/// The value of a protection field that is not reserved (110b and 111b are).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Field(u8);

impl Field {
    pub fn new(value: u8) -> Option<Field> {
        (value <= 5).then_some(Field(value))
    }

    /// Whether tuples go with the blocks.
    pub fn travels(self) -> bool {
        self.0 != 0
    }

    /// The rows 001b to 101b, which all tables share.
    fn row(self) -> Checks {
        match self.0 {
            0 | 3 => Checks::NONE,
            2 => Checks { guard: false, ..Checks::ALL },
            4 => Checks { guard: true, ..Checks::NONE },
            _ => Checks::ALL,
        }
    }

    /// What is checked of tuples from the medium by READ, by VERIFY with BYTCHK = 00b, and by ORWRITE. DPICZ turns the
    /// check off that is made though no tuples travel.
    pub fn on_medium(self, dpicz: bool) -> Checks {
        match self.0 {
            0 if dpicz => Checks::NONE,
            0 => Checks::ALL,
            _ => self.row(),
        }
    }

    /// What is checked of tuples from the medium while they, or the data, are compared with what was sent: VERIFY with
    /// BYTCHK = 01b or 11b.
    pub fn on_medium_compared(self, dpicz: bool) -> Checks {
        if self.travels() { Checks::NONE } else { self.on_medium(dpicz) }
    }

    /// What is checked of tuples from an initiator, before anything is written or compared.
    pub fn on_sent(self) -> Checks {
        self.row()
    }

    /// Which tags VERIFY with BYTCHK = 01b or 11b compares. The tags that the device server may modify are not compared:
    /// the application tag with ATO = 0, and then the reference tag of type 3.
    pub fn compared(self, kind: PiType, ato: bool) -> Checks {
        if !self.travels() {
            return Checks::NONE;
        }
        Checks { guard: self.0 != 2, app: ato, reference: ato || kind != PiType::Type3 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(c: Checks) -> [bool; 3] {
        [c.guard, c.app, c.reference]
    }

    const N: bool = false;
    const Y: bool = true;

    #[test]
    fn reserved_values_are_no_values() {
        for value in 0..=255 {
            assert_eq!(Field::new(value).is_some(), value < 6, "{value}");
        }
    }

    #[test]
    fn the_tables_are_sbc_4s() {
        // Value; from the medium (with DPICZ); while comparing (with DPICZ); from the initiator.
        let rows = [
            (0, [Y, Y, Y], [N, N, N], [Y, Y, Y], [N, N, N], [N, N, N]),
            (1, [Y, Y, Y], [Y, Y, Y], [N, N, N], [N, N, N], [Y, Y, Y]),
            (2, [N, Y, Y], [N, Y, Y], [N, N, N], [N, N, N], [N, Y, Y]),
            (3, [N, N, N], [N, N, N], [N, N, N], [N, N, N], [N, N, N]),
            (4, [Y, N, N], [Y, N, N], [N, N, N], [N, N, N], [Y, N, N]),
            (5, [Y, Y, Y], [Y, Y, Y], [N, N, N], [N, N, N], [Y, Y, Y]),
        ];
        for (value, medium, medium_dpicz, compared, compared_dpicz, sent) in rows {
            let f = Field::new(value).unwrap();
            assert_eq!(f.travels(), value > 0);
            assert_eq!(bits(f.on_medium(false)), medium, "{value}");
            assert_eq!(bits(f.on_medium(true)), medium_dpicz, "{value}");
            assert_eq!(bits(f.on_medium_compared(false)), compared, "{value}");
            assert_eq!(bits(f.on_medium_compared(true)), compared_dpicz, "{value}");
            assert_eq!(bits(f.on_sent()), sent, "{value}");
        }
    }

    #[test]
    fn what_the_device_server_may_modify_is_not_compared() {
        for value in 0..6 {
            let f = Field::new(value).unwrap();
            let sent = value > 0;
            for kind in PiType::ALL {
                let three = kind == PiType::Type3;
                assert_eq!(bits(f.compared(kind, true)), [sent && value != 2, sent, sent], "{value} {kind}");
                assert_eq!(bits(f.compared(kind, false)), [sent && value != 2, N, sent && !three]);
            }
        }
    }
}
