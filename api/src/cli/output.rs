//! Printing: tables for people, JSON for scripts, one writer for both.

use anyhow::Context as _;
use comfy_table::{Table, presets};
use serde::Serialize;

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// For scripts.
    Json,
}

/// Prints `value` as JSON on standard output.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    println!(
        "{}",
        serde_json::to_string_pretty(value).context("cannot print as JSON")?
    );
    Ok(())
}

/// Prints rows under a head, without lines: easy to read, easy to cut.
pub fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_header(head.iter().map(|name| name.to_uppercase()));
    for row in rows {
        table.add_row(row);
    }
    println!("{}", table.trim_fmt());
}

/// Bytes for people.
pub fn bytes(count: u64) -> String {
    const MIB: u64 = 1 << 20;
    match count {
        0..1024 => format!("{count} B"),
        1024..MIB => format!("{} KiB", count / 1024),
        _ => format!("{}.{} MiB", count / MIB, count % MIB * 10 / MIB),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_told_in_the_largest_fitting_unit() {
        assert_eq!(
            (bytes(17), bytes(2048), bytes(3 << 19)),
            ("17 B".into(), "2 KiB".into(), "1.5 MiB".into())
        );
    }
}
