//! Snapshots whose state was changed and whose digests are right: refused, or a guest that runs or ends. The monitor does neither crash
//! nor hang, and KVM takes the next one as ever.

use thaw_fuzz::Dice;
use thaw_vmm_control::{Reply, Request, RestoreRequest};

use crate::freeze::prepared;
use crate::guest::{disk_of, ext4};
use crate::monitor::Monitor;
use crate::mutation::{Original, redigest};

const CASES: u64 = 40;
/// Sections that a monitor decodes at a claim: CPU record, machine.
const STATE: [u32; 2] = [2, 3];
/// Looks at a machine that may run: each is an answer of its control loop.
const LOOKS: usize = 20;

#[test]
fn forty_mutated_machines_are_refused_or_run_and_the_next_restore_works() {
    let (shared, overlay) = (disk_of(b'r', 1 << 20), ext4());
    let (mut monitor, disks) = prepared(1, &shared, &overlay);
    let good = monitor.freeze();
    monitor.quit();

    let original = Original::state_of(&good, &STATE);
    let request = Request::Restore(RestoreRequest {
        disks: disks.clone(),
        resume: true,
        ..Default::default()
    });
    let (mut refused, mut ran, mut ended) = (0, 0, 0);
    let seeds = match std::env::var("THAW_SEED") {
        Ok(seed) => {
            let seed = seed.parse().expect("THAW_SEED is a number");
            seed..seed + 1
        }
        Err(_) => 0..CASES,
    };
    for seed in seeds {
        let mut dice = Dice::from_seed(seed);
        let place = *dice.pick(&original.hot);
        let told = original.change_field(&good, place, &mut dice);
        redigest(&good);
        // Said before it is tried: what follows fails by a panic.
        print!("seed {seed}: {told}: ");
        let mut mutant = Monitor::start();
        match mutant.ask(&request, &[&good, &shared]) {
            Reply::Failed(failure) => {
                println!("{}", failure.message);
                refused += 1;
            }
            reply => {
                assert_eq!(reply, Reply::Done);
                for _ in 0..LOOKS {
                    mutant.status();
                }
                let paused = mutant.ask(&Request::Pause, &[]);
                println!("{paused:?}");
                match paused {
                    Reply::Done => ran += 1,
                    _ => ended += 1,
                }
            }
        }
        // An ordinary end, and nothing else: no signal, no panic.
        mutant.quit();
        original.restore(&good);
    }
    println!("{refused} refused, {ran} ran, {ended} ended by themselves");
    assert!(refused + ran + ended > 0 && (refused == CASES) == (ran + ended == 0));

    let mut restored = Monitor::restore(&good, &disks, &[&shared]);
    restored.done(&Request::Resume, &[]);
    assert_eq!(restored.command("ping x"), "pong x");
    assert_eq!(restored.command("sum"), "0");
    restored.quit();
}
