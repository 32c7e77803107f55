//! Fault points: named moments at which a test has a gateway killed, to see what is left of them. In a product nothing of them
//! is: [`Point::reached`] is empty without the feature `fault-points`, which the tests' own gateway alone is built with
//! (`api/tests/e2e/gateway.rs`).

macro_rules! points {
    ($($(#[doc = $doc:literal])* $point:ident = $name:literal,)*) => {
        /// One moment. `api/tests/e2e/test_kills.py` kills a gateway at each, and fails if one is never reached.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Point {
            $($(#[doc = $doc])* $point,)*
        }

        impl Point {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$point),*];

            /// As it is named to a gateway.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$point => $name,)*
                }
            }
        }
    };
}

points! {
    /// A zip is written under its temporary name.
    CodeUnnamed = "deploy.code-unnamed",
    /// A revision's folder is there, and no row refers to it.
    CodeKept = "deploy.code-kept",
    /// A new function is in the database; its client has no answer.
    FunctionCommitted = "deploy.function-committed",
    /// Another target of a function is in the database; its client has no answer.
    TargetCommitted = "deploy.target-committed",
    /// The code image is made.
    ImageMade = "deploy.image-made",
    /// The snapshot has its name, and does not serve yet.
    Deployed = "deploy.pool-opened",
    /// A revision serves; the one before it has its folder still.
    Served = "deploy.served",
    /// A published version has its folder, and no row.
    VersionKept = "deploy.version-kept",
    /// A published version is in the database; its client has no answer.
    VersionCommitted = "deploy.version-committed",
    /// A version is not in the database any more, and its folder is there.
    VersionRemoved = "deploy.version-removed",
    /// A function is not in the database any more, and its folder is there.
    FunctionRemoved = "deploy.function-removed",
    /// The folder of a removed function is out of the way, and there.
    FolderMoved = "deploy.folder-moved",
    /// A layer version's zip is there, and no row.
    LayerKept = "deploy.layer-kept",
    /// A layer version is in the database; its client has no answer.
    LayerCommitted = "deploy.layer-committed",
    /// A layer version is not in the database any more, and its zip is there.
    LayerRemoved = "deploy.layer-removed",
    /// A key is in the database; its client has no answer.
    KeyCommitted = "deploy.key-committed",
    /// The monitor of a freeze runs, without a guest.
    FreezeStarted = "freeze.started",
    /// The function waits for its first event.
    FreezeReady = "freeze.ready",
    /// The snapshot's file is there, empty and without a name.
    FreezeCreated = "freeze.created",
    /// The monitor has written the snapshot.
    FreezeSaved = "freeze.saved",
    /// It is vouched for, and has no name yet.
    FreezeTagged = "freeze.tagged",
    /// It has its name.
    FreezeCommitted = "freeze.committed",
    /// The runtime's own snapshot is made, and no function's over it.
    BaseMade = "freeze.base-made",
    /// A shell's monitor runs.
    ShellStarted = "claim.shell-started",
    /// The shell is made.
    ShellMade = "claim.shell-made",
    /// A claim ahead of demand has come to its end.
    Claimed = "claim.claimed",
    /// A caller is granted a sandbox.
    Granted = "invoke.granted",
    /// The guest has the request, and runs.
    HandedOver = "invoke.handed-over",
    /// The guest has answered; its client has no answer.
    Answered = "invoke.answered",
    /// A rewind begins.
    RewindBegun = "rewind.begun",
    /// The monitor has rewound its guest.
    Rewound = "rewind.rewound",
    /// An event is in the database; its client has no answer.
    EventCommitted = "events.committed",
    /// An attempt at an event has ended, and the database does not know.
    EventAttempted = "events.attempted",
    /// An event's end is in the database.
    EventSettled = "events.settled",
    /// The gateway starts, and is about to remove what a crash has left.
    CleanBegun = "gc.clean-begun",
    /// It has removed one thing of that.
    CleanRemoved = "gc.clean-removed",
    /// A base that nothing differs from is about to go.
    BaseUnused = "gc.base-unused",
    /// It has gone.
    BaseRemoved = "gc.base-removed",
}

impl Point {
    /// Marks the moment. Does nothing in a product.
    #[inline(always)]
    pub fn reached(self) {
        #[cfg(feature = "fault-points")]
        armed::reached(self);
    }
}

#[cfg(feature = "fault-points")]
pub use armed::arm;

#[cfg(feature = "fault-points")]
mod armed {
    use std::fs;
    use std::path::PathBuf;
    use std::sync::OnceLock;

    use rustix::process::{Signal, getpid, kill_process};

    use super::Point;

    static TRIGGER: OnceLock<PathBuf> = OnceLock::new();

    /// From now on this process is killed by `SIGKILL` when it reaches the point whose name is in the file `trigger`.
    pub fn arm(trigger: PathBuf) {
        // The first one stays.
        let _ = TRIGGER.set(trigger);
    }

    pub(super) fn reached(point: Point) {
        let named = |trigger| fs::read_to_string(trigger).is_ok_and(|name| name == point.name());
        if TRIGGER.get().is_some_and(named) {
            // No process may fail to signal itself, and no instruction follows a SIGKILL of one's own (kill(2)).
            let _ = kill_process(getpid(), Signal::KILL);
        }
    }
}
