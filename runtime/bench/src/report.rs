//! What is told: JSON for scripts, a table for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use crate::memory::Memory;
use crate::restore::{Findings, Plan};
use crate::stats::{Figures, Question, Ratio};

/// Every side that can be measured, in the order in which they are told, and its words.
pub const SIDES: &[(&str, &str)] = &[
    ("floor_new", "floor: new VM → first exit"),
    ("floor_new_split", "floor: new VM, split chips → first exit"),
    ("floor_ready", "floor: ready VM → first exit"),
    (
        "floor_ready_split",
        "floor: ready VM, split chips → first exit",
    ),
    ("cold_first_instruction", "cold: spawn → first instruction"),
    ("cold_answer", "cold: spawn → answer"),
    (
        "cold_unjailed_first_instruction",
        "cold, no jail: spawn → first instruction",
    ),
    ("cold_unjailed_answer", "cold, no jail: spawn → answer"),
    ("claim_first_instruction", "claim → first instruction"),
    ("claim_received", "  sent → received by the monitor"),
    ("claim_decoded", "  → snapshot read"),
    ("claim_mapped", "  → memory mapped"),
    ("claim_vcpus_set", "  → vCPUs set"),
    ("claim_state_set", "  → chips and devices set"),
    ("claim_primed", "  → request in the guest's queue"),
    ("claim_time_set", "  → clocks set"),
    ("claim_entered", "  → guest entered"),
    ("claim_answer", "claim → answer"),
    ("claim_unjailed_answer", "claim → answer, no jail"),
    ("claim_bare_answer", "claim → answer, nothing prefetched"),
    ("rewind_put_back", "rewind: put back"),
    ("rewind_resume_answer", "rewind: resume → answer"),
    ("rewind_answer", "rewind → answer, whole"),
    ("warm_answer", "warm: second answer"),
    ("ours_teardown", "end of a clone"),
    ("firecracker_spawn_api", "Firecracker: spawn → API"),
    ("firecracker_spawn_loaded", "Firecracker: spawn → loaded"),
    ("firecracker_spawn_answer", "Firecracker: spawn → answer"),
    (
        "firecracker_ready_loaded",
        "Firecracker, started ahead: → loaded",
    ),
    (
        "firecracker_ready_answer",
        "Firecracker, started ahead: → answer",
    ),
    ("firecracker_warm_answer", "Firecracker: second answer"),
    ("firecracker_teardown", "Firecracker: end of a clone"),
    ("hello_claimed", "hello, claimed: HTTP"),
    ("hello_rewound", "hello, rewound, rewind included: HTTP"),
    ("hello_warm", "hello, warm: HTTP"),
    ("identity_claimed", "identity, claimed: made unique"),
    ("identity_agent_claimed", "  by the agent"),
    ("identity_hooks_claimed", "  by the runtime's hooks"),
    ("identity_rewound", "identity, rewound: made unique"),
    ("identity_agent_rewound", "  by the agent"),
    ("identity_hooks_rewound", "  by the runtime's hooks"),
];

const FLOOR_READY: &[&str] = &["floor_ready", "floor_ready_split"];
const FLOOR_NEW: &[&str] = &["floor_new", "floor_new_split"];

/// The comparisons, with what is hoped for.
const QUESTIONS: &[Question] = &[
    question(
        "claim_vs_firecracker_spawn",
        "claim_answer",
        &["firecracker_spawn_answer"],
        Some(0.15),
    ),
    question(
        "claim_vs_firecracker_ready",
        "claim_answer",
        &["firecracker_ready_answer"],
        Some(0.25),
    ),
    question(
        "claim_vs_floor",
        "claim_first_instruction",
        FLOOR_READY,
        Some(1.5),
    ),
    question(
        "claim_vs_floor_new",
        "claim_first_instruction",
        FLOOR_NEW,
        Some(0.2),
    ),
    question(
        "rewound_vs_warm",
        "hello_rewound",
        &["hello_warm"],
        Some(1.5),
    ),
    question(
        "cold_vs_firecracker_spawn",
        "cold_answer",
        &["firecracker_spawn_answer"],
        None,
    ),
    question(
        "cold_vs_cold_unjailed",
        "cold_answer",
        &["cold_unjailed_answer"],
        None,
    ),
    question(
        "claim_vs_claim_unjailed",
        "claim_answer",
        &["claim_unjailed_answer"],
        None,
    ),
    question(
        "echo_rewound_vs_claim",
        "rewind_answer",
        &["claim_answer"],
        None,
    ),
    question(
        "echo_rewound_vs_warm",
        "rewind_answer",
        &["warm_answer"],
        None,
    ),
];

const fn question(
    name: &'static str,
    above: &'static str,
    below: &'static [&'static str],
    at_most: Option<f64>,
) -> Question {
    Question {
        name,
        above,
        below,
        at_most,
    }
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Samples of each side.
    pub rounds: u32,
    /// Memory of a guest, MiB.
    pub memory_mib: u32,
    /// Clones alive at once when memory was looked at.
    pub clones: usize,
    /// What this machine says of itself.
    pub host: Host,
    /// Percentiles by side, microseconds.
    pub sides: BTreeMap<String, Figures>,
    /// Medians by medians; null where not measured.
    pub ratios: BTreeMap<&'static str, Option<f64>>,
    /// Why a ratio is null.
    pub ratio_reasons: BTreeMap<&'static str, String>,
    /// What is hoped for, and whether it was reached; null where not measured.
    pub targets: BTreeMap<&'static str, Target>,
    /// Of one clone, by what it had done.
    pub memory: BTreeMap<String, Memory>,
    /// Clones made, answered and ended a second.
    pub clones_per_second: BTreeMap<String, f64>,
    /// What went wrong, by side.
    pub failures: BTreeMap<String, Vec<String>>,
    /// What the reader must know of the sides.
    pub notes: BTreeMap<String, String>,
}

/// A target of a ratio.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Target {
    /// The largest ratio that reaches it.
    pub at_most: f64,
    /// Whether it was.
    pub met: Option<bool>,
}

/// What this machine says of itself.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// Kernel release.
    pub kernel: String,
    /// Processors that this process may use.
    pub cpus: usize,
    /// The processor's name.
    pub processor: String,
}

impl Host {
    /// This machine.
    pub fn this() -> Self {
        let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processor = processor
            .lines()
            .find_map(|line| line.strip_prefix("model name"));
        Self {
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            processor: processor
                .unwrap_or("unknown")
                .trim_matches(['\t', ':', ' '])
                .to_owned(),
        }
    }
}

impl Report {
    /// From what was found.
    pub fn new(plan: &Plan, findings: Findings, host: Host) -> Self {
        let sides = findings.series.figures();
        let answers = QUESTIONS
            .iter()
            .map(|question| (question.name, question.answer(&sides)));
        let mut answers: BTreeMap<&'static str, Ratio> = answers.collect();
        answers.insert("idle_pss_vs_firecracker", idle_pss(&findings.memory));
        let target = |(name, ratio): (&&'static str, &Ratio)| {
            let at_most = ratio.at_most?;
            let met = ratio.value.map(|value| value <= at_most);
            Some((*name, Target { at_most, met }))
        };
        Self {
            rounds: plan.rounds,
            memory_mib: plan.memory_mib,
            clones: plan.clones,
            host,
            targets: answers.iter().filter_map(target).collect(),
            ratios: answers
                .iter()
                .map(|(name, ratio)| (*name, ratio.value))
                .collect(),
            ratio_reasons: answers
                .into_iter()
                .filter_map(|(name, ratio)| Some((name, ratio.reason?)))
                .collect(),
            sides,
            memory: findings.memory,
            clones_per_second: findings.clones_per_second,
            failures: findings.failures,
            notes: findings.notes,
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let out = &mut text;
        let ms = |micros: f64| format!("{:>10.3}", micros / 1e3);
        // Writing into a string cannot fail.
        let _ = writeln!(
            out,
            "{:<44}{:>10}{:>10}{:>10}{:>6}",
            "milliseconds", "p50", "p90", "p99", "n"
        );
        for (side, words) in SIDES {
            if let Some(figures) = self.sides.get(*side) {
                let _ = writeln!(
                    out,
                    "{words:<44}{}{}{}{:>6}",
                    ms(figures.p50_us),
                    ms(figures.p90_us),
                    ms(figures.p99_us),
                    figures.count
                );
            }
        }
        let _ = writeln!(
            out,
            "\n{:<44}{:>10}{:>10}",
            "ratio of medians", "value", "at most"
        );
        for (name, ratio) in &self.ratios {
            let value = ratio.map_or_else(|| "-".into(), |value| format!("{value:.3}"));
            let at_most = self
                .targets
                .get(name)
                .map_or_else(String::new, |target| format!("{:.2}", target.at_most));
            let reason = self.ratio_reasons.get(name).map_or("", String::as_str);
            let _ = writeln!(out, "{name:<44}{value:>10}{at_most:>10}  {reason}");
        }
        let _ = writeln!(
            out,
            "\n{:<44}{:>10}{:>14}{:>10}",
            "KiB of one clone", "Pss", "private dirty", "Rss"
        );
        for (what, memory) in &self.memory {
            let _ = writeln!(
                out,
                "{what:<44}{:>10}{:>14}{:>10}",
                memory.pss_kib, memory.private_dirty_kib, memory.rss_kib
            );
        }
        for (side, rate) in &self.clones_per_second {
            let _ = writeln!(out, "clones a second, made to ended: {side} {rate:.1}");
        }
        for (what, note) in &self.notes {
            let _ = writeln!(out, "{what}: {note}");
        }
        for (side, failures) in &self.failures {
            let _ = writeln!(
                out,
                "{side} failed {} time(s): {}",
                failures.len(),
                failures[0]
            );
        }
        text
    }
}

fn idle_pss(memory: &BTreeMap<String, Memory>) -> Ratio {
    let pss = |what: &str| {
        memory
            .get(what)
            .map(|memory| Duration::from_secs(memory.pss_kib).as_secs_f64())
    };
    let missing = |what: &str| Some(format!("{what} was not measured"));
    let (value, reason) = match (pss("ours_idle"), pss("firecracker_idle")) {
        (Some(ours), Some(other)) if other > 0.0 => (Some(ours / other), None),
        (None, _) => (None, missing("ours_idle")),
        _ => (None, missing("firecracker_idle")),
    };
    Ratio {
        value,
        reason,
        at_most: Some(0.5),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn plan() -> Plan {
        Plan {
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            vmm: PathBuf::new(),
            firecracker: None,
            work: PathBuf::new(),
            rounds: 1,
            clones: 8,
            memory_mib: 128,
        }
    }

    fn host() -> Host {
        Host {
            kernel: "6.1".into(),
            cpus: 2,
            processor: "none".into(),
        }
    }

    #[test]
    fn the_promised_ratios_are_there_and_null_says_why() {
        let mut findings = Findings::default();
        findings
            .series
            .add("claim_answer", Duration::from_millis(10));
        findings
            .series
            .add("firecracker_spawn_answer", Duration::from_millis(100));
        let pss = |pss_kib| Memory {
            pss_kib,
            ..Memory::default()
        };
        findings.memory.insert("ours_idle".into(), pss(3000));
        findings.memory.insert("firecracker_idle".into(), pss(5000));
        let report = serde_json::to_value(Report::new(&plan(), findings, host())).unwrap();
        let ratios = report["ratios"].as_object().unwrap();
        for name in [
            "claim_vs_firecracker_spawn",
            "claim_vs_firecracker_ready",
            "claim_vs_floor",
            "rewound_vs_warm",
            "idle_pss_vs_firecracker",
        ] {
            let told = !ratios[name].is_null();
            assert_eq!(told, report["ratio_reasons"][name].is_null(), "{name}");
        }
        assert!((ratios["claim_vs_firecracker_spawn"].as_f64().unwrap() - 0.1).abs() < 1e-9);
        assert_eq!(report["targets"]["claim_vs_firecracker_spawn"]["met"], true);
        assert_eq!(report["targets"]["idle_pss_vs_firecracker"]["met"], false);
        assert!(report["targets"]["claim_vs_floor"]["met"].is_null());
        assert!(
            report["ratio_reasons"]["rewound_vs_warm"]
                .as_str()
                .unwrap()
                .contains("hello_rewound")
        );
    }

    #[test]
    fn every_side_in_a_question_has_words() {
        let known = |side: &str| SIDES.iter().any(|(name, _)| *name == side);
        for question in QUESTIONS {
            assert!(known(question.above), "{}", question.above);
            assert!(
                question.below.iter().all(|side| known(side)),
                "{:?}",
                question.below
            );
        }
    }

    #[test]
    fn the_table_names_what_was_measured_and_what_failed() {
        let mut findings = Findings::default();
        findings
            .series
            .add("claim_answer", Duration::from_micros(1500));
        findings
            .failures
            .insert("rewind".into(), vec!["the monitor is gone".into()]);
        let text = Report::new(&plan(), findings, host()).text();
        let row = text
            .lines()
            .find(|line| line.starts_with("claim → answer"))
            .unwrap();
        assert!(row.contains("1.500"), "{row}");
        assert!(
            text.contains("rewind failed 1 time(s): the monitor is gone"),
            "{text}"
        );
        assert!(!text.contains("Firecracker"), "{text}");
    }
}
