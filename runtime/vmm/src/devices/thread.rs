//! The one thread that serves queues, the agent stream and the tap, and how it is parked.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::confine::{self, Role};

use super::fault::DeviceFault;
use super::slot::{Backend, Slot, Turn};
use super::{Devices, MMIO_WINDOWS_MAX, lock};

/// Longest wait for the thread to park or to end. One turn of every device takes milliseconds.
const PARK_DEADLINE: Duration = Duration::from_secs(10);
/// Events taken from epoll at once.
const EVENTS_MAX: usize = 32;
/// Epoll token of the wake-up eventfd; queue tokens are `window << 8 | queue`.
const TOKEN_WAKE: u64 = u64::MAX;
/// Epoll token of the agent stream.
const TOKEN_AGENT: u64 = u64::MAX - 1;
/// Epoll token of the tap.
const TOKEN_TAP: u64 = u64::MAX - 2;

/// The device thread could not be started.
#[derive(Debug, thiserror::Error)]
pub enum DeviceStartError {
    /// It runs already, or ran before.
    #[error("device thread was started before")]
    Started,
    /// The host refused the thread.
    #[error("device thread cannot be made")]
    Host(#[source] io::Error),
}

/// The device thread could not be parked.
#[derive(Debug, thiserror::Error)]
pub enum DevicePauseError {
    /// It did not park in time.
    #[error("device thread did not stop within {PARK_DEADLINE:?}")]
    Deadline,
    /// It ended, by a fault or because it was stopped.
    #[error("device thread has ended")]
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    NotStarted,
    Running,
    Parked,
    Ended,
}

#[derive(Debug)]
struct State {
    life: Life,
    pause: bool,
    stop: bool,
}

/// The requests that other threads make of the device thread.
#[derive(Debug)]
pub(super) struct Control {
    state: Mutex<State>,
    changed: Condvar,
    wake: EventFd,
}

impl Control {
    pub(super) fn new(paused: bool) -> io::Result<Self> {
        let state = State {
            life: Life::NotStarted,
            pause: paused,
            stop: false,
        };
        let wake = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            wake,
        })
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the thread is awake.
        let _ = self.wake.write(1);
    }

    /// Waits until the thread serves nothing; at once if it was never started.
    pub(super) fn pause(&self) -> Result<(), DevicePauseError> {
        let mut state = lock(&self.state);
        state.pause = true;
        self.wake();
        let (state, _) = self
            .changed
            .wait_timeout_while(state, PARK_DEADLINE, |state| state.life == Life::Running)
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match state.life {
            Life::NotStarted | Life::Parked => Ok(()),
            Life::Running => Err(DevicePauseError::Deadline),
            Life::Ended => Err(DevicePauseError::Ended),
        }
    }

    pub(super) fn resume(&self) {
        lock(&self.state).pause = false;
        self.changed.notify_all();
    }

    /// Paused, and nothing serves a queue.
    pub(super) fn is_paused(&self) -> bool {
        let state = lock(&self.state);
        state.pause && state.life != Life::Running
    }

    fn stop(&self) {
        lock(&self.state).stop = true;
        self.changed.notify_all();
        self.wake();
    }

    /// The device thread's side: parks while asked to; false when it must end.
    fn checkpoint(&self) -> bool {
        let mut state = lock(&self.state);
        while state.pause && !state.stop {
            state.life = Life::Parked;
            self.changed.notify_all();
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        state.life = Life::Running;
        !state.stop
    }

    fn ended(&self) {
        lock(&self.state).life = Life::Ended;
        self.changed.notify_all();
    }
}

/// The running device thread. Dropping it asks the thread to end without waiting; [`DeviceThread::stop`] waits.
#[derive(Debug)]
pub struct DeviceThread {
    devices: Arc<Devices>,
    handle: Option<JoinHandle<()>>,
}

impl DeviceThread {
    /// Ends the thread and waits for it.
    ///
    /// # Errors
    /// It did not end within 10 s, or it panicked.
    pub fn stop(mut self) -> Result<(), DevicePauseError> {
        let control = &self.devices.control;
        control.stop();
        let (state, timeout) = control
            .changed
            .wait_timeout_while(lock(&control.state), PARK_DEADLINE, |s| {
                s.life != Life::Ended
            })
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        drop(state);
        if timeout.timed_out() {
            return Err(DevicePauseError::Deadline);
        }
        match self.handle.take().map(JoinHandle::join) {
            Some(Err(_)) => Err(DevicePauseError::Ended),
            _ => Ok(()),
        }
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        self.devices.control.stop();
    }
}

/// The earlier of `due` and what `turn` asks for.
pub(super) fn earliest(due: Option<Instant>, turn: Turn, now: Instant) -> Option<Instant> {
    let wanted = match turn {
        Turn::Idle => return due,
        Turn::Again => now,
        Turn::At(at) => at,
    };
    Some(due.map_or(wanted, |due| due.min(wanted)))
}

/// Marks the thread ended on every path out of it, a panic included.
struct EndGuard<'a>(&'a Control);

impl Drop for EndGuard<'_> {
    fn drop(&mut self) {
        self.0.ended();
    }
}

pub(super) fn start(devices: &Arc<Devices>) -> Result<DeviceThread, DeviceStartError> {
    {
        let mut state = lock(&devices.control.state);
        if state.life != Life::NotStarted {
            return Err(DeviceStartError::Started);
        }
        // Parked, not running: a pause that comes before the thread's first step need not wait for it.
        state.life = if state.pause {
            Life::Parked
        } else {
            Life::Running
        };
    }
    let shared = devices.clone();
    let body = move || {
        confine::thread(Role::Devices);
        let _guard = EndGuard(&shared.control);
        if let Err(error) = run(&shared) {
            shared.faults.report(DeviceFault::Thread(error));
        }
    };
    let spawned = std::thread::Builder::new()
        .name("devices".into())
        .spawn(body);
    let handle = spawned.map_err(|error| {
        devices.control.ended();
        DeviceStartError::Host(error)
    })?;
    Ok(DeviceThread {
        devices: devices.clone(),
        handle: Some(handle),
    })
}

/// What the device thread waits for. It exists before the thread and outlives agent streams and taps.
#[derive(Debug)]
pub(super) struct Watch {
    epoll: Epoll,
}

impl Watch {
    /// Watches the wake-up and every queue's notification, but no agent stream or tap yet.
    pub(super) fn new(control: &Control, slots: &[Slot]) -> io::Result<Self> {
        let watch = Self {
            epoll: Epoll::new()?,
        };
        watch.add(control.wake.as_raw_fd(), EventSet::IN, TOKEN_WAKE)?;
        for (window, slot) in (0u64..).zip(slots) {
            for (queue, event) in (0u64..).zip(slot.notify()) {
                watch.add(event.as_raw_fd(), EventSet::IN, window << 8 | queue)?;
            }
        }
        Ok(watch)
    }

    fn add(&self, fd: RawFd, events: EventSet, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(events, token);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }

    /// Begins to watch an agent stream. Edge-triggered: the device reads and writes until it would block, or stops
    /// on purpose when the guest has no room and goes on when the guest notifies.
    pub(super) fn add_stream(&self, fd: RawFd) -> io::Result<()> {
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.add(fd, events, TOKEN_AGENT)
    }

    /// Begins to watch a tap, edge-triggered for the same reason. Whether it takes frames nobody waits for: what it does not
    /// take is lost.
    pub(super) fn add_tap(&self, fd: RawFd) -> io::Result<()> {
        self.add(fd, EventSet::IN | EventSet::EDGE_TRIGGERED, TOKEN_TAP)
    }

    /// Forgets an agent stream or a tap, and the events of it that nobody has looked at.
    pub(super) fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }
}

fn run(devices: &Devices) -> io::Result<()> {
    let mut events = [EpollEvent::default(); EVENTS_MAX];
    let mut due: Option<Instant> = None;
    while devices.control.checkpoint() {
        let count = match devices.watch.epoll.wait(timeout_ms(due), &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let mut ready = [false; MMIO_WINDOWS_MAX];
        for event in &events[..count] {
            note(devices, event, &mut ready);
        }
        let now = Instant::now();
        if due.is_some_and(|due| due <= now) {
            due = None;
            ready.fill(true);
        }
        for (slot, _) in devices.slots.iter().zip(ready).filter(|(_, ready)| *ready) {
            due = earliest(due, slot.serve(), now);
        }
    }
    Ok(())
}

/// Clears one event and marks the device that it is for.
fn note(devices: &Devices, event: &EpollEvent, ready: &mut [bool; MMIO_WINDOWS_MAX]) {
    match event.data() {
        // WouldBlock: cleared already.
        TOKEN_WAKE => drop(devices.control.wake.read()),
        TOKEN_AGENT => {
            let window = devices.disk_count;
            if event
                .event_set()
                .intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP)
            {
                devices.slots[window].with_backend(|backend| match backend {
                    Backend::Vsock(vsock) => vsock.note_hangup(),
                    Backend::Block(_) | Backend::Rng(_) | Backend::Net(_) => {}
                });
            }
            ready[window] = true;
        }
        TOKEN_TAP => {
            if let Some(window) = devices.network_window() {
                ready[window] = true;
            }
        }
        token => {
            let window = usize::try_from(token >> 8).expect("tokens are made from small indices");
            let queue = usize::try_from(token & 0xff).expect("tokens are made from small indices");
            devices.slots[window].clear_notification(queue);
            ready[window] = true;
        }
    }
}

/// Rounded up, so that the wait never ends before `due` and spins.
fn timeout_ms(due: Option<Instant>) -> i32 {
    let Some(due) = due else {
        return -1;
    };
    let wait = due
        .saturating_duration_since(Instant::now())
        .as_micros()
        .div_ceil(1000);
    i32::try_from(wait).unwrap_or(i32::MAX)
}
