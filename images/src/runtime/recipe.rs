//! What each runtime's image is made of, as data: an image is built anew when any of it changes.

use serde::Serialize;

use super::RuntimeName;
use super::npm::{AWS_LAMBDA_RIC_3, NODE_ADDON_API, NpmPackage};
use super::table::{Language, Node, Python};
use super::wheels::Wheel;
use crate::apt::Suite;
use crate::digest;

/// Goes up when code, not data, changes what comes out.
const FORMAT: u32 = 1;

/// A base image.
#[derive(Debug, Serialize)]
pub(super) struct Recipe {
    format: u32,
    /// Where packages come from.
    pub(super) suite: Suite,
    /// Packages to install with all they depend on.
    pub(super) packages: Vec<String>,
    /// Packages of that closure to leave out: only maintainer scripts use them, and none is run.
    pub(super) without: Vec<&'static str>,
    /// Paths to remove after unpacking.
    pub(super) remove: Vec<String>,
    /// Folders to make: path, permission bits.
    pub(super) folders: Vec<(&'static str, u32)>,
    /// Files to write: path, permission bits, text.
    pub(super) files: Vec<(&'static str, u32, String)>,
    /// Symbolic links to make: path, target.
    pub(super) links: Vec<(&'static str, String)>,
    /// Unpacked into /var/runtime.
    pub(super) wheels: Vec<Wheel>,
    /// Node.js with its headers, where no package has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) node: Option<Wheel>,
    /// Needed, with a compiler, for the native parts of the Lambda client.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) npm: Vec<NpmPackage>,
    /// Packages with headers that those are compiled with; none of it is in the image.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) headers: Vec<&'static str>,
    /// The image's own Python, which compiles files ahead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) python: Option<&'static str>,
    /// Folders whose Python files are compiled ahead.
    pub(super) compile: Vec<String>,
}

const BASE_PACKAGES: [&str; 21] = [
    "base-files",
    "bash",
    "ca-certificates",
    "coreutils",
    "curl",
    "dash",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "libc-bin",
    "libgcc-s1",
    "libstdc++6",
    "mawk",
    "mount",
    "procps",
    "sed",
    "tar",
    "tzdata",
    // Satisfies "the file system is merged" without the Perl program that would merge it.
    "usr-is-merged",
    "util-linux",
];

const WITHOUT: [&str; 4] = ["debconf", "dpkg", "init-system-helpers", "usr-is-merged"];

/// Documentation, translations, and the trees of services that a guest does not run.
const REMOVE: [&str; 26] = [
    "etc/cron.d",
    "etc/cron.daily",
    "etc/dpkg",
    "etc/init.d",
    "etc/pam.conf",
    "etc/pam.d",
    "usr/lib/systemd",
    "usr/lib/udev",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/share/base-files",
    "usr/share/bash-completion",
    "usr/share/bug",
    "usr/share/debconf",
    "usr/share/doc",
    "usr/share/doc-base",
    "usr/share/gdb",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/menu",
    "usr/share/pixmaps",
    "usr/share/polkit-1",
    "usr/share/zoneinfo/right",
    "var/cache",
    "var/lib/dpkg",
];

/// The file system is merged (bin is usr/bin), as the distribution's own installer sets it up.
pub(super) const MERGED: [(&str, &str); 4] = [
    ("bin", "usr/bin"),
    ("lib", "usr/lib"),
    ("lib64", "usr/lib64"),
    ("sbin", "usr/sbin"),
];

const FOLDERS: [(&str, u32); 17] = [
    ("dev", 0o755),
    ("etc", 0o755),
    ("home/sbx_user1051", 0o755),
    ("mnt", 0o755),
    ("opt", 0o755),
    ("proc", 0o755),
    ("root", 0o755),
    ("run", 0o755),
    ("run/lock", 0o1777),
    ("srv", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("var/cache", 0o755),
    ("var/log", 0o755),
    ("var/runtime", 0o755),
    ("var/task", 0o755),
    ("var/tmp", 0o1777),
];

/// The user and group numbers are those that functions see on Lambda.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
sbx_user1051:x:993:990::/home/sbx_user1051:/usr/sbin/nologin
";
const GROUP: &str = "root:x:0:
daemon:x:1:
tty:x:5:
sbx_user1051:x:990:
nogroup:x:65534:
";
const NSSWITCH: &str = "passwd: files
group: files
shadow: files
hosts: files dns
networks: files
protocols: files
services: files
";
/// The second name is the one under which extensions listen for telemetry.
const HOSTS: &str = "127.0.0.1 localhost
127.0.0.1 sandbox.localdomain sandbox
::1 localhost ip6-localhost ip6-loopback
";

/// What starts the runtime in Lambda's own images; programs look whether it is there.
const ENTRYPOINT: &str = "#!/bin/sh
exec /var/runtime/bootstrap \"$@\"
";

const FILES: [(&str, u32, &str); 9] = [
    ("etc/group", 0o644, GROUP),
    ("etc/hostname", 0o644, "localhost\n"),
    ("etc/hosts", 0o644, HOSTS),
    // Empty means "not set up yet" (machine-id(5)): the agent mounts each clone's own here.
    ("etc/machine-id", 0o444, ""),
    ("etc/nsswitch.conf", 0o644, NSSWITCH),
    ("etc/passwd", 0o644, PASSWD),
    ("etc/resolv.conf", 0o644, ""),
    ("etc/timezone", 0o644, "Etc/UTC\n"),
    ("lambda-entrypoint.sh", 0o755, ENTRYPOINT),
];

/// What maintainer scripts would link.
const LINKS: [(&str, &str); 9] = [
    ("etc/localtime", "/usr/share/zoneinfo/Etc/UTC"),
    ("etc/mtab", "/proc/self/mounts"),
    ("usr/bin/awk", "mawk"),
    ("usr/bin/sh", "dash"),
    ("usr/bin/which", "which.debianutils"),
    // The environment of a function says LANG=en_US.UTF-8; the C locale's tables serve it.
    ("usr/lib/locale/en_US.utf8", "C.utf8"),
    // OpenSSL's default file; without it clients would look for a folder of hashed names.
    ("usr/lib/ssl/cert.pem", "/etc/ssl/certs/ca-certificates.crt"),
    ("var/lock", "/run/lock"),
    ("var/run", "/run"),
];

/// Runs a runtime's command: through the function's own program where `AWS_LAMBDA_EXEC_WRAPPER` names one, which gets the command
/// as its arguments (AWS Lambda Developer Guide, "Modifying the runtime environment"). Words and numbers are those of Lambda.
const START: &str = r#"wrapper=$AWS_LAMBDA_EXEC_WRAPPER
if [ -n "$wrapper" ]; then
    [ -f "$wrapper" ] || { echo "$wrapper: does not exist"; exit 127; }
    [ -x "$wrapper" ] || { echo "$wrapper: is not an executable"; exit 126; }
    set -- "$wrapper" "$@"
fi
exec -- "$@"
"#;

/// In the folder of Python's own modules.
const PYTHON_REMOVE: [&str; 4] = ["ensurepip", "idlelib", "pydoc_data", "test"];

/// Bash, as on Lambda: it leaves PWD and SHLVL in the environment.
fn python_bootstrap(version: &str) -> String {
    format!(
        "#!/bin/bash
export PYTHONPATH=\"${{PYTHONPATH:+$PYTHONPATH:}}/var/runtime\"
set -- /usr/bin/python{version} /var/runtime/thaw_runtime.py
. /var/runtime/start
"
    )
}

/// Starts the Lambda client with hooks that make a clone unique.
const PYTHON_RUNTIME: &str = include_str!("recipe/thaw_runtime.py");

const NODE_REMOVE: [&str; 4] = [
    "usr/bin/acorn",
    "usr/include",
    "usr/share/gcc",
    "usr/share/systemtap",
];

/// Paths and sizes of the heap as Lambda sets them; `--require` comes before all of the function's code.
fn node_bootstrap(node: &Node) -> String {
    let major = node.major;
    let mut off = String::new();
    for feature in node.off {
        // An option on the command line would prevail over one in the variable.
        off.push_str(&format!(
            "case \"$NODE_OPTIONS\" in *--experimental-{feature}*) ;; *) set -- \"$@\" --no-experimental-{feature} ;; esac\n"
        ));
    }
    format!(
        "#!/bin/bash
export NODE_PATH=\"${{NODE_PATH:+$NODE_PATH:}}/opt/nodejs/node{major}/node_modules:/opt/nodejs/node_modules:/var/runtime/node_modules:/var/runtime:/var/task\"
memory=${{AWS_LAMBDA_FUNCTION_MEMORY_SIZE:-128}}
set --
{off}set -- /var/lang/bin/node --max-http-header-size=81920 \\
    --max-semi-space-size=$((memory * 5 / 100)) --max-old-space-size=$((memory * 9 / 10)) \\
    \"$@\" --require /var/runtime/thaw_runtime.cjs /var/runtime/thaw_index.mjs
. /var/runtime/start
"
    )
}

/// Makes a clone unique.
const NODE_RUNTIME: &str = include_str!("recipe/thaw_runtime.cjs");
/// What renews the generator in OpenSSL; see `addons`.
pub(super) const IDENTITY: &str = include_str!("recipe/thaw_identity.c");

impl Recipe {
    /// The recipe of a runtime's image.
    pub(super) fn of(name: RuntimeName) -> Self {
        let row = name.row();
        let mut recipe = Self {
            format: FORMAT,
            suite: row.suite,
            packages: BASE_PACKAGES.map(str::to_owned).to_vec(),
            without: WITHOUT.to_vec(),
            remove: REMOVE.map(str::to_owned).to_vec(),
            folders: FOLDERS.to_vec(),
            files: FILES
                .map(|(path, mode, text)| (path, mode, text.to_owned()))
                .to_vec(),
            links: LINKS
                .map(|(path, target)| (path, target.to_owned()))
                .to_vec(),
            wheels: Vec::new(),
            node: None,
            npm: Vec::new(),
            headers: Vec::new(),
            python: None,
            compile: Vec::new(),
        };
        if row.suite != Suite::Machine {
            // Since Debian 13 the older names of time zones, US/Eastern for one, are a package of their own.
            recipe.packages.push("tzdata-legacy".to_owned());
        }
        match &row.language {
            Language::Own => {}
            Language::Python(python) => recipe.add_python(python),
            Language::Node(node) => recipe.add_node(node),
        }
        recipe
    }

    fn add_python(&mut self, python: &Python) {
        let program = format!("python{}", python.version);
        let library = format!("usr/lib/{program}");
        self.packages.push(program.clone());
        let own = PYTHON_REMOVE.map(|name| format!("{library}/{name}"));
        self.remove.extend(own);
        self.remove.extend([
            format!("{library}/config-{}-x86_64-linux-gnu", python.version),
            "usr/share/applications".to_owned(),
            "usr/share/python3".to_owned(),
        ]);
        let bootstrap = python_bootstrap(python.version);
        self.files.extend([
            ("var/runtime/bootstrap", 0o755, bootstrap),
            ("var/runtime/start", 0o644, START.to_owned()),
            (
                "var/runtime/thaw_runtime.py",
                0o644,
                PYTHON_RUNTIME.to_owned(),
            ),
        ]);
        self.links.push(("usr/bin/python3", program));
        self.wheels.extend(python.client);
        self.python = Some(python.version);
        self.compile.extend([library, "var/runtime".to_owned()]);
    }

    fn add_node(&mut self, node: &Node) {
        self.remove.extend(NODE_REMOVE.map(str::to_owned));
        self.files.extend([
            ("var/runtime/bootstrap", 0o755, node_bootstrap(node)),
            ("var/runtime/start", 0o644, START.to_owned()),
            (
                "var/runtime/thaw_index.mjs",
                0o644,
                node.client.index.to_owned(),
            ),
            (
                "var/runtime/thaw_runtime.cjs",
                0o644,
                NODE_RUNTIME.to_owned(),
            ),
            // Compiled, not copied; here it is part of the recipe's digest.
            ("var/runtime/thaw_identity.c", 0o644, IDENTITY.to_owned()),
        ]);
        // The native part of every version of the client is made from the third's sources.
        self.npm.extend([AWS_LAMBDA_RIC_3, NODE_ADDON_API]);
        if node.client.package != AWS_LAMBDA_RIC_3 {
            self.npm.push(node.client.package);
        }
        self.headers.push("libcurl4-openssl-dev");
        self.node = node.program;
        if node.program.is_none() {
            self.packages.push("nodejs".to_owned());
            self.headers.extend(["libnode-dev", "libuv1-dev"]);
            let program = "/usr/bin/node".to_owned();
            self.links.push(("var/lang/bin/node", program));
        }
    }

    /// Every wheel that is needed.
    pub(super) fn wheels(&self) -> Vec<Wheel> {
        self.wheels.iter().chain(&self.node).copied().collect()
    }

    /// SHA-256 of everything above.
    pub(super) fn digest(&self) -> String {
        digest::bytes(&serde_json::to_vec(self).expect("a recipe has no maps"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::{Command, Output};

    use super::*;

    fn bootstrap(name: &str) -> String {
        let recipe = Recipe::of(name.parse().unwrap());
        let is_bootstrap = |file: &&(&str, u32, String)| file.0 == "var/runtime/bootstrap";
        recipe.files.iter().find(is_bootstrap).unwrap().2.clone()
    }

    #[test]
    fn what_a_runtime_starts_follows_the_version() {
        for (name, words) in [
            ("python3.11", "set -- /usr/bin/python3.11 "),
            ("python3.13", "set -- /usr/bin/python3.13 "),
            ("nodejs18.x", "/opt/nodejs/node18/node_modules"),
            ("nodejs24.x", "/opt/nodejs/node24/node_modules"),
        ] {
            assert!(bootstrap(name).contains(words), "{name}");
        }
    }

    #[test]
    fn node_features_that_lambda_switches_off_can_be_switched_on() {
        let text = bootstrap("nodejs22.x").replace(". /var/runtime/start", "echo \"$@\"");
        let options = |node_options: &str| {
            let output = Command::new("bash")
                .args(["-c", &text])
                .env("NODE_OPTIONS", node_options)
                .output()
                .unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let off = [
            "--no-experimental-require-module",
            "--no-experimental-detect-module",
        ];
        let told = options("");
        assert!(off.iter().all(|option| told.contains(option)), "{told}");
        let told = options("--inspect --experimental-require-module");
        assert!(!told.contains(off[0]) && told.contains(off[1]), "{told}");
        assert!(!bootstrap("nodejs24.x").contains("experimental"));
    }

    #[test]
    fn every_recipe_is_another() {
        let digests: Vec<_> = RuntimeName::all()
            .map(|name| Recipe::of(name).digest())
            .collect();
        let distinct: std::collections::BTreeSet<_> = digests.iter().collect();
        assert_eq!(distinct.len(), digests.len());
    }

    /// What comes of a command that is started with this wrapper, `None` for none.
    fn started(wrapper: Option<&str>) -> Output {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("start"), START).unwrap();
        fs::write(path("good"), "#!/bin/bash\nWRAPPED=yes exec \"$@\"\n").unwrap();
        fs::set_permissions(path("good"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(path("unfit"), "").unwrap();
        let script = "set -- /usr/bin/env; . ./start";
        let mut command = Command::new("/bin/bash");
        command.args(["-c", script]).env_clear();
        command.env("PATH", "/usr/bin:/bin").current_dir(&folder);
        if let Some(wrapper) = wrapper {
            command.env("AWS_LAMBDA_EXEC_WRAPPER", path(wrapper));
        }
        command.output().unwrap()
    }

    #[test]
    fn a_wrapper_runs_the_runtimes_command_and_is_told_when_it_cannot() {
        let text = |output: &Output| String::from_utf8(output.stdout.clone()).unwrap();
        let plain = text(&started(None));
        assert!(
            plain.contains("SHLVL=0\n") && plain.contains("PWD=/"),
            "{plain}"
        );
        assert!(!plain.contains("WRAPPED"));
        assert!(text(&started(Some("good"))).contains("WRAPPED=yes\n"));
        for (wrapper, code, words) in [
            ("absent", 127, "absent: does not exist\n"),
            ("unfit", 126, "unfit: is not an executable\n"),
        ] {
            let output = started(Some(wrapper));
            assert_eq!(output.status.code(), Some(code));
            assert!(text(&output).ends_with(words), "{}", text(&output));
        }
    }
}
