//! What a job is told at its beginning: what it is for, what it copies, and what it does about errors.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    job::OnError,
    volume::{Extent, ExtentKind},
};

/// What is copied (MirrorSyncMode).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SyncMode {
    /// All that a guest can read.
    Full,
    /// What the image itself holds; the target has the same backing file.
    Top,
    /// What is written from now on.
    None,
    /// What a dirty bitmap has.
    Bitmap,
}

/// What a job is for. All of them copy what a dirty map says; they differ in what there is to copy, and in how they end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// The volume is copied to another, and may go over to it.
    #[default]
    Mirror,
    /// What lies beneath the volume, above the image at that depth, is copied into the volume itself (`block-stream`). It ends by itself.
    Stream {
        /// [`u32::MAX`]: all that lies beneath.
        below: u32,
    },
    /// What the volume has above the image at that depth is copied to that image, and the volume goes over to it (`block-commit` of the
    /// active layer).
    Commit {
        /// 1 or more.
        below: u32,
    },
    /// The same of an image that nobody writes to, seen from that. It ends by itself.
    CommitBeneath {
        /// 1 or more.
        below: u32,
    },
    /// The volume is copied to another host, and stops once that has all of it. Nothing here goes over to it.
    Handover,
    /// The volume as it was when the job began is copied to another, before each change of it (`drive-backup`). It ends by itself.
    Backup,
}

impl Task {
    /// Whether it ends when it has copied all, without being told to.
    pub fn ends_by_itself(self) -> bool {
        matches!(self, Task::Stream { .. } | Task::CommitBeneath { .. } | Task::Backup)
    }

    /// Whether what there is to copy is what there was when it began, so that no change may come before its copy.
    pub fn keeps_the_past(self) -> bool {
        self == Task::Backup
    }

    /// Whether its target is to have all that a guest can read.
    pub fn copies_all(self) -> bool {
        matches!(self, Task::Mirror | Task::Handover)
    }

    /// Whether its target is the volume itself.
    pub fn is_within(self) -> bool {
        matches!(self, Task::Stream { .. })
    }

    /// QEMU's word for it (JobType).
    pub fn word(self) -> &'static str {
        match self {
            Task::Mirror | Task::Handover => "mirror",
            Task::Backup => "backup",
            Task::Stream { .. } => "stream",
            Task::Commit { .. } | Task::CommitBeneath { .. } => "commit",
        }
    }

    /// Whether a run of the source's map is to be copied, where the map alone says it.
    pub(in crate::job) fn wants(self, extent: &Extent) -> bool {
        match self {
            Task::Mirror | Task::Handover | Task::Backup => true,
            // With nothing left beneath, what no file says anything of reads as zeros anyway. Over a base its zeros are kept, and where a
            // file in between was too short to say anything, too.
            Task::Stream { below: u32::MAX } => extent.depth > 0 && extent.kind == ExtentKind::Data,
            Task::Stream { below } => match extent.kind {
                ExtentKind::Unallocated => extent.depth < below,
                _ => (1..below).contains(&extent.depth),
            },
            Task::Commit { below } | Task::CommitBeneath { below } => extent.depth < below,
        }
    }
}

/// How it keeps up (MirrorCopyMode).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyMode {
    /// Writes go to the source, and are copied later.
    #[default]
    Background,
    /// Writes go to both.
    WriteBlocking,
}

/// How much of its time a job may copy while guests are at work, in percent: after each piece it rests for the others' part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Share(u8);

impl Share {
    /// All of it: no rest.
    pub const WHOLE: Share = Share(100);
    /// The longest rest: whoever waits for a job with a small share sees it move.
    const LONGEST_REST: Duration = Duration::from_secs(1);

    /// The rest that is owed after so much work.
    pub(super) fn rest(self, worked: Duration) -> Duration {
        let others = u32::from(100 - self.0);
        (worked * others / u32::from(self.0)).min(Share::LONGEST_REST)
    }
}

impl TryFrom<u64> for Share {
    type Error = String;

    fn try_from(percent: u64) -> Result<Share, String> {
        match u8::try_from(percent) {
            Ok(n @ 1..=100) => Ok(Share(n)),
            _ => Err(format!("a share of {percent} %: give 1 to 100")),
        }
    }
}

impl From<Share> for u64 {
    fn from(share: Share) -> u64 {
        share.0.into()
    }
}

impl Default for Share {
    fn default() -> Share {
        Share::WHOLE
    }
}

/// What a mirror is told at its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// What it is for.
    #[serde(default)]
    pub task: Task,
    /// What is copied.
    pub sync: SyncMode,
    /// How it keeps up.
    pub copy_mode: CopyMode,
    /// Zeros take no space in the target.
    pub unmap: bool,
    /// Bytes a second; 0 for no limit.
    pub speed: u64,
    /// Of its time, while guests are at work.
    #[serde(default)]
    pub share: Share,
    /// About errors of the source.
    pub on_source_error: OnError,
    /// About errors of the target.
    pub on_target_error: OnError,
    /// It ends as soon as it can once it is told to; otherwise it waits to be told once more.
    pub auto_finalize: bool,
    /// It is forgotten as soon as it has ended.
    pub auto_dismiss: bool,
    /// It waits to be resumed.
    pub paused: bool,
}

impl Settings {
    /// Whether it is a backup that copies what is overwritten, and nothing else.
    pub fn keeps_only_the_past(&self) -> bool {
        self.task.keeps_the_past() && self.sync == SyncMode::None
    }

    /// Whether a run of the source's map is to be copied, where the map alone says it.
    pub(super) fn wants(&self, extent: &Extent) -> bool {
        match (self.task, self.sync) {
            (Task::Backup, SyncMode::Top) => extent.depth == 0 && extent.kind != ExtentKind::Unallocated,
            (task, _) => task.wants(extent),
        }
    }
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            task: Task::Mirror,
            sync: SyncMode::Full,
            copy_mode: CopyMode::Background,
            unmap: true,
            speed: 0,
            share: Share::WHOLE,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            auto_finalize: true,
            auto_dismiss: true,
            paused: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_part_of_the_time_and_its_rests_are_bounded() {
        let share = |percent: u64| Share::try_from(percent).unwrap();
        let ms = Duration::from_millis;
        for (percent, worked, rest) in
            [(100, 7, 0), (50, 7, 7), (25, 10, 30), (20, 1, 4), (1, 1, 99), (1, 100, 1000)]
        {
            assert_eq!(share(percent).rest(ms(worked)), ms(rest), "{percent} %");
        }
        for none in [0, 101, 1 << 40] {
            assert!(Share::try_from(none).is_err_and(|e| e.contains("1 to 100")), "{none}");
        }
    }

    #[test]
    fn settings_that_were_written_before_there_were_shares_have_all_of_it() {
        let mut kept = serde_json::to_value(Settings::default()).unwrap();
        assert_eq!(kept["share"], 100);
        kept.as_object_mut().unwrap().remove("share");
        assert_eq!(serde_json::from_value::<Settings>(kept.clone()).unwrap(), Settings::default());
        kept["share"] = 0.into();
        assert!(serde_json::from_value::<Settings>(kept).is_err());
    }
}
