//! Images ordered by a gateway that cannot make them: in the lab, where compiling takes forever, it asks the process that
//! started the lab. An order is a file in a folder that both see. Locks do not reach across the lab's border,
//! and a file that was seen in there stays what it was: each step has a file of its own.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::fault::FileError;
use crate::progress::Progress;
use crate::runtime::RuntimeName;
use crate::staging::make_dir;

/// How often both sides look.
pub(crate) const INTERVAL: Duration = Duration::from_millis(200);
/// Longest wait for an image. A slow network brings its packages in some minutes.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(1800);

/// The folder of orders.
#[derive(Clone, Debug)]
pub(crate) struct Orders {
    folder: PathBuf,
}

impl Orders {
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    fn path(&self, name: RuntimeName, kind: &str) -> PathBuf {
        self.folder.join(format!("{name}.{kind}"))
    }

    /// Orders `name` and waits until `look` finds it. `Ok(Err(reason))` is what the maker says went wrong.
    pub(crate) fn place<T>(
        &self,
        name: RuntimeName,
        look: impl Fn() -> Option<T>,
        progress: &mut dyn Progress,
    ) -> Result<Result<T, String>, FileError> {
        make_dir(&self.folder)?;
        let (order, failed) = (self.path(name, "order"), self.path(name, "failed"));
        remove(&failed)?;
        write(&order, "")?;
        let deadline = Instant::now() + WAIT_MAX;
        let mut told = 0;
        loop {
            if let Some(found) = look() {
                return Ok(Ok(found));
            }
            if let Ok(reason) = fs::read_to_string(&failed) {
                return Ok(Err(reason));
            }
            if Instant::now() > deadline {
                remove(&order)?;
                let minutes = WAIT_MAX.as_secs() / 60;
                return Ok(Err(format!("nobody made it within {minutes} minutes")));
            }
            while let Ok(step) = fs::read_to_string(self.path(name, &step_kind(told))) {
                progress.step(&step);
                told += 1;
            }
            thread::sleep(INTERVAL);
        }
    }

    /// Makes what was ordered so far. An order that fails is answered with its reason; `make` returns it.
    pub(crate) fn serve(
        &self,
        mut make: impl FnMut(RuntimeName, &mut dyn Progress) -> Result<(), String>,
        progress: &mut dyn Progress,
    ) -> Result<(), FileError> {
        for name in RuntimeName::all() {
            let order = self.path(name, "order");
            if !order.exists() {
                continue;
            }
            let mut noted = Noted {
                orders: self,
                name,
                count: 0,
                progress,
            };
            let made = make(name, &mut noted);
            let count = noted.count;
            if let Err(reason) = made {
                write(&self.path(name, "failed"), &reason)?;
            }
            for number in 0..count {
                remove(&self.path(name, &step_kind(number)))?;
            }
            remove(&order)?;
        }
        Ok(())
    }
}

fn step_kind(number: usize) -> String {
    format!("step-{number}")
}

/// Writes each step where the one that waits looks for it.
struct Noted<'a> {
    orders: &'a Orders,
    name: RuntimeName,
    count: usize,
    progress: &'a mut dyn Progress,
}

impl Progress for Noted<'_> {
    fn step(&mut self, step: &str) {
        // Only for people: a step that is not told costs nothing.
        let file = self.orders.path(self.name, &step_kind(self.count));
        let _ = write(&file, step);
        self.count += 1;
        self.progress.step(&format!("image {}: {step}", self.name));
    }

    fn detail(&mut self, text: &str) {
        self.progress.detail(text);
    }

    fn done(&mut self, took: Duration) {
        self.progress.done(took);
    }
}

/// Under another name first, so that nobody reads half of it.
fn write(path: &Path, text: &str) -> Result<(), FileError> {
    let half = path.with_added_extension("half");
    fs::write(&half, text).map_err(FileError::on("writing", &half))?;
    fs::rename(&half, path).map_err(FileError::on("renaming to", path))
}

fn remove(path: &Path) -> Result<(), FileError> {
    ignore_absence(fs::remove_file(path)).map_err(FileError::on("removing", path))
}

fn ignore_absence(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::progress::Quiet;

    fn node() -> RuntimeName {
        "nodejs22.x".parse().unwrap()
    }

    #[derive(Default)]
    struct Steps(Vec<String>);

    impl Progress for Steps {
        fn step(&mut self, name: &str) {
            self.0.push(name.to_owned());
        }
        fn detail(&mut self, _text: &str) {}
        fn done(&mut self, _took: Duration) {}
    }

    /// Serves until the order in `folder` was answered.
    fn maker(folder: &Path, make: impl Fn(&mut dyn Progress) -> Result<(), String>) {
        let orders = Orders::new(folder.to_owned());
        let is_served = AtomicBool::new(false);
        while !is_served.load(Ordering::Relaxed) {
            let make_one = |name, progress: &mut dyn Progress| {
                assert_eq!(name, node());
                is_served.store(true, Ordering::Relaxed);
                make(progress)
            };
            orders.serve(make_one, &mut Quiet).unwrap();
        }
    }

    #[test]
    fn an_image_that_was_ordered_comes_and_its_steps_are_heard() {
        let home = tempfile::tempdir().unwrap();
        let made = home.path().join("made");
        let (folder, mut steps) = (home.path().join("orders"), Steps::default());
        let answer = thread::scope(|scope| {
            scope.spawn(|| {
                maker(&folder, |progress| {
                    progress.step("download packages");
                    progress.step("unpack packages");
                    thread::sleep(INTERVAL * 3);
                    fs::write(&made, "image").map_err(|e| e.to_string())
                });
            });
            let look = || fs::read_to_string(&made).ok();
            Orders::new(folder.clone()).place(node(), look, &mut steps)
        });
        assert_eq!(answer.unwrap().unwrap(), "image");
        assert_eq!(steps.0, ["download packages", "unpack packages"]);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    }

    #[test]
    fn an_order_that_fails_is_answered_with_the_reason_and_can_be_placed_again() {
        let home = tempfile::tempdir().unwrap();
        for reason in ["no network", "no room"] {
            let answer = thread::scope(|scope| {
                scope.spawn(|| maker(home.path(), |_| Err(reason.to_owned())));
                let orders = Orders::new(home.path().to_owned());
                orders.place(node(), || None::<()>, &mut Quiet)
            });
            assert_eq!(answer.unwrap().unwrap_err(), reason);
        }
    }
}
