//! What only the processor itself can tell: who virtualizes it, and its time-stamp counter. QEMU's TCG hands it to the lab as it is, and the lab's kernel must be told its frequency: its own
//! calibration against an emulated timer fails on a busy machine.

use std::time::{Duration, Instant};

/// Frequency in kHz, good to about 0.01 %, measured in `rounds` of `pause` each; the round least disturbed counts.
pub fn tsc_khz(rounds: u32, pause: Duration) -> u64 {
    let mut best: Option<(Duration, u128)> = None;
    for _ in 0..rounds.max(1) {
        let (before, early, after) = (Instant::now(), counter(), Instant::now());
        std::thread::sleep(pause);
        let (before_late, late, after_late) = (Instant::now(), counter(), Instant::now());
        let doubt = (after - before) + (after_late - before_late);
        let span = (before_late + (after_late - before_late) / 2) - (before + (after - before) / 2);
        let khz = u128::from(late.wrapping_sub(early)) * 1_000_000 / span.as_nanos().max(1);
        if best.is_none_or(|(least, _)| doubt < least) {
            best = Some((doubt, khz));
        }
    }
    best.and_then(|(_, khz)| u64::try_from(khz).ok())
        .unwrap_or_default()
}

#[expect(unsafe_code, reason = "reading the counter is an intrinsic")]
fn counter() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor, and Linux leaves it to user space.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// CPUID leaf 0x4000_0000 if a hypervisor is present (leaf 1, ECX bit 31).
pub fn hypervisor_signature() -> Option<[u8; 12]> {
    let present = leaf(1).ecx >> 31 == 1;
    let found = leaf(0x4000_0000);
    let mut signature = [0; 12];
    for (place, register) in signature
        .chunks_exact_mut(4)
        .zip([found.ebx, found.ecx, found.edx])
    {
        place.copy_from_slice(&register.to_le_bytes());
    }
    present.then_some(signature)
}

fn leaf(number: u32) -> core::arch::x86_64::CpuidResult {
    core::arch::x86_64::__cpuid(number)
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_measurements_agree_within_a_percent() {
        let pause = std::time::Duration::from_millis(10);
        let (one, two) = (super::tsc_khz(3, pause), super::tsc_khz(3, pause));
        assert!(one > 100_000, "{one} kHz");
        assert!(one.abs_diff(two) < one / 100, "{one} and {two} kHz");
    }
}
