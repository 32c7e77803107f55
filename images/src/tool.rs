//! Runs the programs of the host that images are made with.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// How much of a failed program's stderr an error carries.
const STDERR_BYTES_MAX: usize = 2000;

/// A host program, and the distribution package that has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tool {
    pub(crate) name: &'static str,
    pub(crate) package: &'static str,
}

pub(crate) const APT_GET: Tool = Tool {
    name: "apt-get",
    package: "apt",
};
pub(crate) const DPKG_DEB: Tool = Tool {
    name: "dpkg-deb",
    package: "dpkg",
};
pub(crate) const MKFS_EROFS: Tool = Tool {
    name: "mkfs.erofs",
    package: "erofs-utils",
};
pub(crate) const MKFS_EXT4: Tool = Tool {
    name: "mkfs.ext4",
    package: "e2fsprogs",
};
pub(crate) const PYTHON_PIP: Tool = Tool {
    name: "python3",
    package: "python3-pip",
};
/// Compiles C, too.
pub(crate) const GXX: Tool = Tool {
    name: "g++",
    package: "g++",
};
/// Starts a loader: it is no program of the host's own.
pub(crate) const LOADER: Tool = Tool {
    name: "env",
    package: "coreutils",
};
/// Started by its path alone, see [`Tool::run_at`].
pub(crate) const NODE: Tool = Tool {
    name: "node",
    package: "nodejs",
};
pub(crate) const TAR: Tool = Tool {
    name: "tar",
    package: "tar",
};

/// A host program that is missing or failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The program is not installed.
    #[error("{tool} is not installed: install the package {package}")]
    Missing {
        /// The program.
        tool: &'static str,
        /// The distribution package that has it.
        package: &'static str,
    },
    /// The program could not be started.
    #[error("starting {tool}")]
    Start {
        /// The program.
        tool: &'static str,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The program ran and failed.
    #[error("{tool} failed ({status}): {stderr}")]
    Failed {
        /// The program.
        tool: &'static str,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// The last 2000 bytes of what it wrote to stderr.
        stderr: String,
    },
}

impl ToolError {
    /// The failed program's last words.
    pub(crate) fn stderr(&self) -> &str {
        match self {
            Self::Failed { stderr, .. } => stderr,
            _ => "",
        }
    }
}

impl Tool {
    /// Runs the program to its end; `prepare` adds arguments. Returns its stdout.
    ///
    /// The locale and the time zone are fixed, so that output can be parsed and images do not
    /// depend on the user.
    pub(crate) fn run(self, prepare: impl Fn(&mut Command)) -> Result<Vec<u8>, ToolError> {
        self.succeeded(self.output(prepare)?)
    }

    /// The same with the program at `path`, wherever the host has another one.
    pub(crate) fn run_at(
        self,
        path: &Path,
        prepare: impl Fn(&mut Command),
    ) -> Result<Vec<u8>, ToolError> {
        let output = self.start(path.as_os_str(), &prepare);
        self.succeeded(output.map_err(|source| ToolError::Start {
            tool: self.name,
            source,
        })?)
    }

    fn succeeded(self, output: Output) -> Result<Vec<u8>, ToolError> {
        if output.status.success() {
            return Ok(output.stdout);
        }
        let stderr = output.stderr.as_slice();
        let tail = &stderr[stderr.len().saturating_sub(STDERR_BYTES_MAX)..];
        Err(ToolError::Failed {
            tool: self.name,
            status: output.status,
            stderr: String::from_utf8_lossy(tail).trim().to_owned(),
        })
    }

    fn output(self, prepare: impl Fn(&mut Command)) -> Result<Output, ToolError> {
        match self.start(self.name.as_ref(), &prepare) {
            // An ordinary user's PATH lacks the sbin folders where mkfs.* and ldconfig live.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.start(format!("/usr/sbin/{}", self.name).as_ref(), &prepare)
            }
            other => other,
        }
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ToolError::Missing {
                tool: self.name,
                package: self.package,
            },
            _ => ToolError::Start {
                tool: self.name,
                source,
            },
        })
    }

    /// What the program writes first to stdout when asked for its version with `flag`.
    ///
    /// Some versions print it and then fail, so the exit status does not count.
    pub(crate) fn version(self, flag: &str) -> Result<String, ToolError> {
        let output = self.output(|command| {
            command.arg(flag);
        })?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or_default().trim().to_owned())
    }

    fn start(self, program: &OsStr, prepare: &impl Fn(&mut Command)) -> io::Result<Output> {
        let mut command = Command::new(program);
        command
            .stdin(Stdio::null())
            .env("LC_ALL", "C.UTF-8")
            .env("TZ", "UTC");
        prepare(&mut command);
        command.output()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_names_its_package() {
        let tool = Tool {
            name: "thaw-no-such-program",
            package: "no-such-package",
        };
        let error = tool.run(|_| {}).expect_err("cannot exist");
        assert_eq!(
            error.to_string(),
            "thaw-no-such-program is not installed: install the package no-such-package"
        );
    }

    #[test]
    fn a_failing_program_hands_back_its_last_words() {
        let tool = Tool {
            name: "sh",
            package: "dash",
        };
        let error = tool
            .run(|command| {
                command.args(["-c", "echo gone wrong >&2; exit 3"]);
            })
            .expect_err("exits 3");
        assert_eq!(error.stderr(), "gone wrong");
        assert!(error.to_string().contains("exit status: 3"), "{error}");
    }
}
