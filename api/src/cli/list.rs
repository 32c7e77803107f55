//! `thaw ls` and `thaw rm`.

use std::process::ExitCode;

use clap::Args;
use thaw_api_types::thaw::{FunctionSummary, MachineSummary};

use super::Global;
use super::output::{self, Format};

#[derive(Args)]
pub struct RmArgs {
    /// Function names.
    #[arg(required = true)]
    names: Vec<String>,
}

pub async fn ls(global: &Global) -> anyhow::Result<ExitCode> {
    let list = global.client()?.list().await?;
    if global.format() == Format::Json {
        output::json(&list)?;
        return Ok(ExitCode::SUCCESS);
    }
    if list.functions.is_empty() {
        println!("no functions yet: `thaw init DIR` writes one, `thaw deploy DIR` makes it run");
        return Ok(ExitCode::SUCCESS);
    }
    let head = [
        "name", "runtime", "handler", "state", "memory", "snapshot", "ready", "running", "calls",
        "cold", "claimed", "rewound",
    ];
    output::table(&head, list.functions.iter().map(row));
    println!("{}", machine(&list.machine));
    for function in &list.functions {
        let problem = function
            .state_reason
            .as_ref()
            .or(function.last_error.as_ref());
        if let Some(problem) = problem {
            println!("\n{}: {problem}", function.name);
        }
        if let Some(init) = &function.init_error {
            println!(
                "\n{}: fails when it starts: {}: {}",
                function.name, init.error_type, init.message
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What all sandboxes use of the machine, and may use.
fn machine(now: &MachineSummary) -> String {
    let of = |limit: Option<u64>| {
        limit
            .map(|limit| format!(" of {limit}"))
            .unwrap_or_default()
    };
    format!(
        "sandboxes may use {}{} MiB; {}{} virtual CPUs run; {} shells",
        now.memory_mib,
        of(now.memory_budget_mib),
        now.vcpus,
        of(now.vcpu_budget.map(u64::from)),
        now.shells
    )
}

fn row(function: &FunctionSummary) -> Vec<String> {
    let state = if function.init_error.is_some() {
        "init error".into()
    } else {
        function.state.to_lowercase()
    };
    let snapshot = function
        .snapshot
        .map(|snapshot| output::bytes(snapshot.stored_bytes))
        .unwrap_or_default();
    let (name, runtime, handler) = (
        function.name.clone(),
        function.runtime.clone(),
        function.handler.clone(),
    );
    let pool = &function.pool;
    let counts = [
        pool.ready,
        pool.running,
        pool.invocations,
        pool.cold,
        pool.claimed,
        pool.rewound,
    ]
    .map(|count| count.to_string());
    [
        vec![
            name,
            runtime,
            handler,
            state,
            format!("{} MiB", function.memory_mib),
            snapshot,
        ],
        counts.to_vec(),
    ]
    .concat()
}

pub async fn rm(global: &Global, args: &RmArgs) -> anyhow::Result<ExitCode> {
    let client = global.client()?;
    for name in &args.names {
        client.delete(name).await?;
        if global.format() == Format::Text {
            println!("removed {name}");
        }
    }
    if global.format() == Format::Json {
        output::json(&args.names)?;
    }
    Ok(ExitCode::SUCCESS)
}
