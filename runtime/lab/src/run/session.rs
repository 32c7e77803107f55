//! From the command's start to its end, sans-I/O: what was heard comes in, what to do goes out. `run.rs` drives it.

use std::time::{Duration, Instant};

/// The init says every 5 s that it lives; a busy machine may delay it.
const SILENCE_LIMIT: Duration = Duration::from_secs(90);
const SIGTERM: i32 = 15;
/// Exit code of a command that was killed: 128 + SIGKILL.
const KILLED: i32 = 137;

/// What was heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A sign of life from the init.
    Alive,
    /// The command ended, with this exit code.
    Exited(i32),
    /// The command could not be started.
    Failed(i32, String),
    /// The control socket closed.
    Gone,
    /// Standard output or standard error came to its end.
    StreamEnd,
    /// A signal for the command.
    Signal(i32),
    /// Nothing until [`Session::wake_at`].
    Nothing,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// Listen on.
    Wait,
    /// Send the command this signal.
    Pass(i32),
    /// End the lab; the run is over.
    End(End),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// With this exit code.
    Code(i32),
    /// After its time limit.
    TimeLimit,
    /// It could not be started: exit code and reason.
    Failed(i32, String),
    /// The lab failed, in these words.
    Lost(&'static str),
}

/// One run. Times are the caller's.
#[derive(Debug)]
pub struct Session {
    /// Last sign of life.
    heard: Instant,
    /// Output streams that have not ended.
    stream_count: u8,
    code: Option<i32>,
    grace: Duration,
    /// When the time limit passes.
    limit: Option<Instant>,
    /// It has passed.
    is_over: bool,
    /// When the lab is ended whatever the command does.
    cut: Option<Instant>,
}

impl Session {
    /// A command that was started at `now`, with two output streams.
    pub fn new(now: Instant, time_limit: Option<Duration>, grace: Duration) -> Self {
        let limit = time_limit.map(|limit| now + limit);
        Self {
            heard: now,
            stream_count: 2,
            code: None,
            grace,
            limit,
            is_over: false,
            cut: None,
        }
    }

    /// When to come back with [`Input::Nothing`].
    pub fn wake_at(&self) -> Instant {
        let silence = self.heard + SILENCE_LIMIT;
        let limit = self.limit.filter(|_| self.cut.is_none());
        [limit, self.cut]
            .into_iter()
            .flatten()
            .fold(silence, Instant::min)
    }

    /// Takes in what was heard at `now`.
    pub fn on(&mut self, now: Instant, input: Input) -> Act {
        match input {
            Input::Alive => self.heard = now,
            Input::Exited(code) => self.code = Some(code),
            Input::Failed(code, why) => return Act::End(End::Failed(code, why)),
            Input::Gone if self.code.is_none() => {
                return Act::End(End::Lost("ended before the command did"));
            }
            Input::Gone => {}
            Input::StreamEnd => self.stream_count = self.stream_count.saturating_sub(1),
            Input::Signal(signal) => {
                self.cut.get_or_insert(now + self.grace);
                return Act::Pass(signal);
            }
            Input::Nothing => return self.time_passed(now),
        }
        match self.code {
            Some(code) if self.stream_count == 0 => self.end(code),
            _ => Act::Wait,
        }
    }

    fn time_passed(&mut self, now: Instant) -> Act {
        if self.cut.is_some_and(|cut| cut <= now) {
            return self.end(self.code.unwrap_or(KILLED));
        }
        if self.cut.is_none() && self.limit.is_some_and(|limit| limit <= now) {
            self.is_over = true;
            self.cut = Some(now + self.grace);
            return Act::Pass(SIGTERM);
        }
        if self.heard + SILENCE_LIMIT <= now {
            if self.code.is_none() {
                return Act::End(End::Lost("hangs"));
            }
            self.heard = now; // only the reader of our own output is slow
        }
        Act::Wait
    }

    fn end(&self, code: i32) -> Act {
        Act::End(if self.is_over {
            End::TimeLimit
        } else {
            End::Code(code)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn session(limit: Option<Duration>) -> (Session, Instant) {
        let now = Instant::now();
        (Session::new(now, limit, 15 * SECOND), now)
    }

    #[test]
    fn run_ends_with_its_code_once_both_streams_have() {
        for order in [[0, 1, 2], [1, 0, 2], [1, 2, 0]] {
            let (mut session, now) = session(None);
            let inputs = [Input::Exited(7), Input::StreamEnd, Input::StreamEnd];
            let acts = order.map(|at| session.on(now, inputs[at].clone()));
            assert_eq!(acts, [Act::Wait, Act::Wait, Act::End(End::Code(7))]);
        }
    }

    #[test]
    fn closed_socket_matters_only_before_the_exit() {
        let (mut lost, now) = session(None);
        assert!(matches!(lost.on(now, Input::Gone), Act::End(End::Lost(_))));
        let (mut ended, now) = session(None);
        ended.on(now, Input::Exited(0));
        assert_eq!(ended.on(now, Input::Gone), Act::Wait);
    }

    #[test]
    fn first_signal_starts_the_grace_period_and_later_ones_do_not_prolong_it() {
        let (mut session, now) = session(None);
        assert_eq!(session.on(now, Input::Signal(2)), Act::Pass(2));
        assert_eq!(
            session.on(now + 10 * SECOND, Input::Signal(15)),
            Act::Pass(15)
        );
        assert_eq!(session.wake_at(), now + 15 * SECOND);
        assert_eq!(
            session.on(now + 15 * SECOND, Input::Nothing),
            Act::End(End::Code(KILLED))
        );
    }

    #[test]
    fn time_limit_terminates_first_and_ends_after_the_grace_period() {
        let (mut session, now) = session(Some(5 * SECOND));
        assert_eq!(session.wake_at(), now + 5 * SECOND);
        assert_eq!(
            session.on(now + 5 * SECOND, Input::Nothing),
            Act::Pass(SIGTERM)
        );
        assert_eq!(
            session.on(now + 20 * SECOND, Input::Nothing),
            Act::End(End::TimeLimit)
        );
    }

    #[test]
    fn silent_lab_is_lost_but_a_slow_reader_is_not() {
        let (mut silent, now) = session(None);
        silent.on(now + 60 * SECOND, Input::Alive);
        assert_eq!(silent.on(now + 91 * SECOND, Input::Nothing), Act::Wait);
        assert_eq!(
            silent.on(silent.wake_at(), Input::Nothing),
            Act::End(End::Lost("hangs"))
        );
        let (mut slow, now) = session(None);
        slow.on(now, Input::Exited(0));
        assert_eq!(slow.on(slow.wake_at(), Input::Nothing), Act::Wait);
        assert!(slow.wake_at() > now + 91 * SECOND);
    }
}
