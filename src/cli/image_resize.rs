//! `tcmu-dif image resize`: another size for an image that nobody uses, in qemu-img's words.

use super::{CliError, Done, image::warn_of_sidecar, image_args::ImageResize, output, size};
use crate::{
    admin::images::open_failed,
    image::{
        Driver,
        open::{OpenOptions, open_any_size},
    },
    sys,
    volume::{IoError, Volume},
};

/// `SIZE`, `+SIZE` or `-SIZE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewSize {
    /// That many bytes.
    To(u64),
    /// So many more.
    By(u64),
    /// So many fewer.
    Less(u64),
}

impl NewSize {
    /// Parses one.
    ///
    /// # Errors
    /// In words, what a size is.
    pub fn parse(text: &str) -> Result<NewSize, String> {
        match (text.strip_prefix('+'), text.strip_prefix('-')) {
            (Some(more), _) => size::parse(more).map(NewSize::By),
            (_, Some(less)) => size::parse(less).map(NewSize::Less),
            _ => size::parse(text).map(NewSize::To),
        }
    }

    /// The size that this makes of one; `None` if that is none.
    fn of(self, old: u64) -> Option<u64> {
        let new = match self {
            NewSize::To(size) => Some(size),
            NewSize::By(more) => old.checked_add(more),
            NewSize::Less(less) => old.checked_sub(less),
        };
        new.filter(|n| *n > 0 && i64::try_from(*n).is_ok())
    }
}

/// How it ended.
enum Ended {
    Resized { old: u64, new: u64 },
    NoSize(u64),
    Odd(u64),
    WouldShrink { old: u64, new: u64 },
    Failed(IoError),
}

/// Runs `image resize`.
pub fn run(args: &ImageResize) -> Done {
    let (path, at) = (&args.path, args.path.clone());
    let (format, wanted, shrink) = (args.format, args.size, args.shrink);
    let ended = sys::run(async move |io| {
        let options = OpenOptions { format, ..OpenOptions::default() };
        let image = open_any_size(&io, &at, &options).await?;
        let old = image.limits().capacity;
        let ended = match wanted.of(old) {
            None => Ended::NoSize(old),
            Some(new) if new % 512 != 0 => Ended::Odd(new),
            Some(new) if new < old && !shrink => Ended::WouldShrink { old, new },
            Some(new) => {
                let done = match image.driver() {
                    Driver::Qcow2(qcow2) if new < old => qcow2.shrink(new).await,
                    _ => image.resize(new).await,
                };
                done.map_or_else(Ended::Failed, |()| Ended::Resized { old, new })
            }
        };
        let closed = image.close().await;
        Ok(match (ended, closed) {
            (Ended::Resized { .. }, Err(e)) => Ended::Failed(e),
            (ended, _) => ended,
        })
    });
    let bytes = |n: u64| format!("{} ({n} bytes)", size::human(n));
    match ended.map_err(|e| open_failed(path, &e))? {
        Ended::Resized { old, new } => {
            warn_of_sidecar(path);
            if args.json.json {
                let filename = path.display().to_string();
                return output::json(
                    &serde_json::json!({ "filename": filename, "virtual-size": new, "before": old }),
                );
            }
            output::print("Image resized.")
        }
        Ended::NoSize(old) => {
            let reason = format!("new image size must be positive, and below 8 EiB; it is {}", bytes(old));
            Err(CliError::new("image", path.display(), reason)
                .then("choose a size above 0: tcmu-dif image resize --help"))
        }
        Ended::Odd(new) => {
            let reason = format!("the new size must be a multiple of 512, and {new} is not");
            let up = new.next_multiple_of(512);
            Err(CliError::new("image", path.display(), reason)
                .then(format!("choose {up}: tcmu-dif image resize {} {up}", path.display())))
        }
        Ended::WouldShrink { old, new } => {
            let reason = format!(
                "shrinking it from {} to {} deletes all data beyond the new end",
                bytes(old),
                bytes(new)
            );
            Err(CliError::new("image", path.display(), reason)
                .then("make sure that there is nothing of worth, and use the --shrink option"))
        }
        Ended::Failed(e) => Err(CliError::from("image", path.display(), &e)
            .then(format!("look at the image: tcmu-dif image info {}", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_absolute_or_a_difference() {
        assert_eq!(NewSize::parse("+1M").unwrap().of(5 << 20), Some(6 << 20));
        assert_eq!(NewSize::parse("-1M").unwrap().of(5 << 20), Some(4 << 20));
        assert_eq!(NewSize::parse("1M").unwrap().of(5 << 20), Some(1 << 20));
        assert_eq!(NewSize::parse("-5M").unwrap().of(5 << 20), None);
        assert_eq!(NewSize::parse("-6M").unwrap().of(5 << 20), None);
        assert_eq!(NewSize::parse("+7E").unwrap().of(2 << 60), None);
        assert!(NewSize::parse("--1").is_err() && NewSize::parse("+").is_err());
    }
}
