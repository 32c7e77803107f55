//! Which system calls a thread may make: tables of rules, each with its reason, compiled to the kernel's filters
//! (seccomp(2), Documentation/userspace-api/seccomp_filter.rst).
//!
//! A call that no rule allows is not carried out: the thread gets SIGSYS, whose handler ([`report_violations`]) writes the
//! call's number to standard error and ends the process. A rule for `rt_sigaction` would let the handler be replaced; with none, and
//! as the kernel kills a process whose SIGSYS is blocked or ignored, every violation is the end. A filter is inherited by the threads
//! that a thread makes, and those that are added only take away.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use thiserror::Error;

/// How a process ends that made a forbidden call: 128 and the signal's number, as a shell would say it.
pub const VIOLATION_EXIT_CODE: i32 = 128 + libc::SIGSYS;

/// One system call that is allowed.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Its number (`libc::SYS_…`).
    pub call: libc::c_long,
    /// With which arguments.
    pub only: Only,
    /// Who makes it, and for what.
    pub reason: &'static str,
}

/// With which arguments a call is allowed.
#[derive(Clone, Copy, Debug)]
pub enum Only {
    /// With all.
    Any,
    /// With an argument of which these bits, of its lower 32, have this value.
    Bits {
        /// Which argument, from 0.
        argument: u8,
        /// Which of its bits.
        mask: u32,
        /// What they must be.
        value: u32,
    },
    /// With one of these values of an argument, of which 32 bits are looked at.
    Values(u8, &'static [u32]),
    /// ioctl(2), with one of these requests of a driver: `_IOC` has its letter in bits 8 to 15 and the request's number below. Looked at in
    /// their order.
    Requests {
        /// The driver's letter.
        driver: u8,
        /// Numbers of requests.
        numbers: &'static [u8],
    },
}

impl Only {
    /// mmap(2), mprotect(2): not of memory that can be executed.
    pub const NOT_EXECUTABLE: Self = Self::Bits {
        argument: 2,
        mask: libc::PROT_EXEC.unsigned_abs(),
        value: 0,
    };
    /// openat(2): to read what is there, and nothing else.
    pub const TO_READ: Self = Self::Bits {
        argument: 2,
        mask: (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC).unsigned_abs(),
        value: libc::O_RDONLY.unsigned_abs(),
    };
    /// clone(2): a thread of this process and of its namespaces.
    pub const THREAD: Self = Self::Bits {
        argument: 0,
        mask: NAMESPACES | libc::CLONE_THREAD.unsigned_abs(),
        value: libc::CLONE_THREAD.unsigned_abs(),
    };
}

/// Flags of clone(2) that make a namespace.
const NAMESPACES: u32 = (libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWUTS)
    .unsigned_abs();

/// Allows a call with all arguments.
#[must_use]
pub const fn any(call: libc::c_long, reason: &'static str) -> Rule {
    only(call, Only::Any, reason)
}

/// Allows a call with some arguments.
#[must_use]
pub const fn only(call: libc::c_long, only: Only, reason: &'static str) -> Rule {
    Rule { call, only, reason }
}

/// No filter.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// The rules make none: too many, or a contradiction.
    #[error("the rules for system calls make no filter")]
    Compile(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The kernel does not take it.
    #[error("the filter of system calls was refused")]
    Apply(#[source] seccompiler::Error),
    /// The handler of violations.
    #[error("the handler of forbidden system calls could not be set")]
    Handler(#[source] io::Error),
}

/// A compiled filter.
#[derive(Clone, Debug)]
pub struct Filter(BpfProgram);

impl Filter {
    /// A filter that allows what one of the tables allows.
    ///
    /// # Errors
    /// They are too long for a filter, 4,096 instructions.
    pub fn compile(tables: &[&[Rule]]) -> Result<Self, SeccompError> {
        let compiled = compiled(tables);
        compiled.map(Self).map_err(SeccompError::Compile)
    }

    /// A filter that says of these calls that the kernel has none such, and leaves all others to other filters: clone3(2) keeps its flags
    /// in memory, where no filter sees them, and libraries then take clone(2).
    ///
    /// # Errors
    /// They make no filter.
    pub fn absent(calls: &[libc::c_long]) -> Result<Self, SeccompError> {
        let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
        let none = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
        let built = build(rules, SeccompAction::Allow, none);
        built.map(Self).map_err(SeccompError::Compile)
    }

    /// Puts the calling thread, and those that it will make, behind it.
    ///
    /// # Errors
    /// The kernel has no filters, or the thread may not have one.
    pub fn apply(&self) -> Result<(), SeccompError> {
        seccompiler::apply_filter(&self.0).map_err(SeccompError::Apply)
    }
}

fn compiled(tables: &[&[Rule]]) -> Result<BpfProgram, Box<dyn std::error::Error + Send + Sync>> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut whole = Vec::new();
    for rule in tables.iter().copied().flatten() {
        let alternatives = rules.entry(rule.call).or_default();
        match rule.only {
            Only::Any => whole.push(rule.call),
            Only::Bits {
                argument,
                mask,
                value,
            } => {
                let is = SeccompCmpOp::MaskedEq(u64::from(mask));
                alternatives.push(when(argument, is, u64::from(value))?);
            }
            Only::Values(argument, values) => {
                for value in values {
                    alternatives.push(when(argument, SeccompCmpOp::Eq, u64::from(*value))?);
                }
            }
            Only::Requests { driver, numbers } => {
                for number in numbers {
                    let request = u64::from(u16::from_be_bytes([driver, *number]));
                    alternatives.push(when(1, SeccompCmpOp::MaskedEq(0xffff), request)?);
                }
            }
        }
    }
    // No alternatives: whatever the arguments.
    rules.extend(whole.into_iter().map(|call| (call, Vec::new())));
    build(rules, SeccompAction::Trap, SeccompAction::Allow)
}

fn build(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    these: SeccompAction,
) -> Result<BpfProgram, Box<dyn std::error::Error + Send + Sync>> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(rules, others, these, arch)?;
    Ok(BpfProgram::try_from(filter)?)
}

fn when(
    argument: u8,
    is: SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule, Box<dyn std::error::Error + Send + Sync>> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, is, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

/// Has forbidden calls told on standard error before they end the process. Before any filter, which would forbid this.
///
/// # Errors
/// The signal's handler cannot be set.
pub fn report_violations() -> Result<(), SeccompError> {
    // SAFETY: all zeros is a valid sigaction, and the handler has the signature that SA_SIGINFO asks for; it calls only
    // async-signal-safe functions.
    let set = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_violation as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut())
    };
    match set {
        0 => Ok(()),
        _ => Err(SeccompError::Handler(io::Error::last_os_error())),
    }
}

/// Where `siginfo_t` has the number of the call: after three integers, padding and an address (sigaction(2), `si_syscall`).
const CALL_OFFSET: usize = 24;

extern "C" fn on_violation(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    let mut name = [0_u8; 16];
    // SAFETY: the kernel hands a siginfo_t of 128 bytes, in which a SIGSYS has the call's number at this offset, aligned to 4;
    // PR_GET_NAME writes 16 bytes at most; `write` and `_exit` take what is ours. All are async-signal-safe.
    unsafe {
        let call = info.cast::<u8>().add(CALL_OFFSET).cast::<i32>().read();
        libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr());
        let mut line = Line::default();
        line.push(b"system call ");
        line.push_number(call.unsigned_abs());
        line.push(b" is forbidden to thread ");
        line.push(name.split(|byte| *byte == 0).next().unwrap_or(&[]));
        line.push(b"\n");
        libc::write(2, line.bytes.as_ptr().cast(), line.length);
        libc::_exit(VIOLATION_EXIT_CODE);
    }
}

/// A line of text on the stack: a signal handler must not allocate.
struct Line {
    bytes: [u8; 96],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 96],
            length: 0,
        }
    }
}

impl Line {
    fn push(&mut self, bytes: &[u8]) {
        for (place, byte) in self.bytes[self.length..].iter_mut().zip(bytes) {
            *place = *byte;
            self.length += 1;
        }
    }

    fn push_number(&mut self, number: u32) {
        let mut divisor = 1_000_000_000;
        while divisor > 1 && number < divisor {
            divisor /= 10;
        }
        while divisor > 0 {
            let digit = u8::try_from(number / divisor % 10).unwrap_or(0);
            self.push(&[b'0' + digit]);
            divisor /= 10;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_in_full() {
        for (number, text) in [(0, "0"), (59, "59"), (435, "435"), (u32::MAX, "4294967295")] {
            let mut line = Line::default();
            line.push_number(number);
            assert_eq!(&line.bytes[..line.length], text.as_bytes());
        }
    }

    #[test]
    fn a_line_that_is_too_long_is_cut() {
        let mut line = Line::default();
        line.push(&[b'x'; 200]);
        assert_eq!(line.length, line.bytes.len());
    }

    #[test]
    fn tables_are_joined_and_a_call_that_one_allows_whole_is_allowed_whole() {
        let run = Only::Requests {
            driver: 0xae,
            numbers: &[0x80],
        };
        let some = [only(libc::SYS_ioctl, run, "kvm")];
        let whole = [any(libc::SYS_ioctl, "everything")];
        let joined = Filter::compile(&[&some, &whole]).expect("a filter");
        let alone = Filter::compile(&[&whole]).expect("a filter");
        assert_eq!(joined.0, alone.0);
        assert_ne!(Filter::compile(&[&some]).expect("a filter").0, alone.0);
    }
}
