//! With the feature `bindgen`: regenerates the bindings from the installed kernel header.
//! The checked-in `src/bindings.rs` is what this writes on Debian 12; `cargo xtask bindgen --check` proves it.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "bindgen")]
    generate();
}

#[cfg(feature = "bindgen")]
fn generate() {
    let out =
        std::path::PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR")).join("bindings.rs");
    bindgen::Builder::default()
        .header_contents("wrapper.h", WRAPPER)
        .allowlist_type("tcmu_.*")
        .allowlist_var("(TCMU|ALIGN_SIZE|OFFSET_).*")
        .use_core()
        // bindgen cannot express a packed struct with an aligned or a flexible member: these stay opaque (their
        // size and alignment are asserted), and src/lib.rs names their fields.
        .opaque_type("tcmu_mailbox")
        .opaque_type("tcmu_cmd_entry")
        .opaque_type("tcmu_tmr_entry")
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .layout_tests(true)
        .generate()
        .expect("bindgen could not read <linux/target_core_user.h>")
        .write_to_file(&out)
        .expect("bindings could not be written");
    println!("cargo:rustc-env=TCMU_SYS_GENERATED={}", out.display());
}

/// The compiler's own word on the offsets that src/lib.rs relies on.
#[cfg(feature = "bindgen")]
const WRAPPER: &str = "
#include <linux/target_core_user.h>
enum {
    OFFSET_MAILBOX_CMD_HEAD = __builtin_offsetof(struct tcmu_mailbox, cmd_head),
    OFFSET_MAILBOX_CMD_TAIL = __builtin_offsetof(struct tcmu_mailbox, cmd_tail),
    OFFSET_REQ_IOV_CNT = __builtin_offsetof(struct tcmu_cmd_entry, req.iov_cnt),
    OFFSET_REQ_IOV_BIDI_CNT = __builtin_offsetof(struct tcmu_cmd_entry, req.iov_bidi_cnt),
    OFFSET_REQ_IOV_DIF_CNT = __builtin_offsetof(struct tcmu_cmd_entry, req.iov_dif_cnt),
    OFFSET_REQ_CDB_OFF = __builtin_offsetof(struct tcmu_cmd_entry, req.cdb_off),
    OFFSET_REQ_IOV = __builtin_offsetof(struct tcmu_cmd_entry, req.iov),
    OFFSET_RSP_SCSI_STATUS = __builtin_offsetof(struct tcmu_cmd_entry, rsp.scsi_status),
    OFFSET_RSP_READ_LEN = __builtin_offsetof(struct tcmu_cmd_entry, rsp.read_len),
    OFFSET_RSP_SENSE_BUFFER = __builtin_offsetof(struct tcmu_cmd_entry, rsp.sense_buffer),
    OFFSET_TMR_TYPE = __builtin_offsetof(struct tcmu_tmr_entry, tmr_type),
    OFFSET_TMR_CMD_CNT = __builtin_offsetof(struct tcmu_tmr_entry, cmd_cnt),
    OFFSET_TMR_CMD_IDS = __builtin_offsetof(struct tcmu_tmr_entry, cmd_ids),
};
";
