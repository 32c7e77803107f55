//! Native parts of the Node.js image, compiled by this machine's compiler against the image's own libraries and headers.
//!
//! The Lambda client's is compiled from its package's own sources, but for curl: it links the distribution's libcurl, which
//! gets security updates, where the package's own build would link the old one that it carries.

use std::fs;
use std::path::{Path, PathBuf};

use super::ImageError;
use super::npm::{AWS_LAMBDA_RIC, NODE_ADDON_API, NpmError, untar};
use super::recipe::{IDENTITY, Recipe};
use crate::apt::{Apt, Package};
use crate::fault::FileError;
use crate::staging::{Staging, make_dir};
use crate::tool::{GXX, LOADER};

/// The C++ part of the Lambda client, in its package, and the version that it tells the Runtime API.
const LAMBDA_CPP: &str = "deps/aws-lambda-cpp-0.2.8.tar.gz";
const LAMBDA_CPP_VERSION: [(&str, &str); 3] = [("MAJOR", "0"), ("MINOR", "2"), ("PATCH", "8")];

/// What of the client's package is in the image.
const KEPT: [&str; 5] = [
    "dist/index.mjs",
    "package.json",
    "LICENSE",
    "NOTICE",
    "THIRD-PARTY-LICENSES",
];

const CLIENT_FOLDER: &str = "var/runtime/node_modules/aws-lambda-ric";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// Puts the Lambda client for Node.js, and what renews OpenSSL's generator, into `tree`.
pub(super) fn build(
    recipe: &Recipe,
    apt: &Apt,
    staging: &Staging,
    tree: &Path,
) -> Result<(), ImageError> {
    let scratch = staging.path().join("addons");
    let headers = unpack_headers(recipe, apt, &scratch)?;
    let cache = apt.root().join("npm");
    let client = AWS_LAMBDA_RIC.unpack(&cache, &scratch)?;
    let api = NODE_ADDON_API.unpack(&cache, &scratch)?;
    for file in KEPT {
        copy(&client.join(file), &tree.join(CLIENT_FOLDER).join(file))?;
    }
    let addon = tree.join(CLIENT_FOLDER).join("dist/rapid-client.node");
    compile_client(&client, &api, &headers, tree, &addon)?;
    let identity = tree.join("var/runtime/thaw_identity.node");
    compile_identity(&scratch, &headers, tree, &identity)?;
    for addon in [&addon, &identity] {
        check(addon, tree)?;
    }
    Ok(())
}

/// The packages that only compiling needs: those of the recipe, without what they depend on.
pub(super) fn headers(recipe: &Recipe, apt: &Apt) -> Result<Vec<Package>, ImageError> {
    if recipe.headers.is_empty() {
        return Ok(Vec::new());
    }
    let mut packages = apt.resolve(&recipe.headers)?;
    packages.retain(|package| recipe.headers.contains(&package.name.as_str()));
    Ok(packages)
}

fn unpack_headers(recipe: &Recipe, apt: &Apt, scratch: &Path) -> Result<PathBuf, ImageError> {
    let folder = scratch.join("headers");
    make_dir(&folder)?;
    for package in headers(recipe, apt)? {
        apt.unpack(&package, &scratch.join("package.tar"), &folder)?;
    }
    Ok(folder.join("usr/include"))
}

fn copy(from: &Path, to: &Path) -> Result<(), FileError> {
    if let Some(parent) = to.parent() {
        make_dir(parent)?;
    }
    fs::copy(from, to)
        .map(|_bytes| ())
        .map_err(FileError::on("copying to", to))
}

fn compile_client(
    client: &Path,
    api: &Path,
    headers: &Path,
    tree: &Path,
    addon: &Path,
) -> Result<(), ImageError> {
    let cpp = client.join("deps/aws-lambda-cpp");
    make_dir(&cpp)?;
    untar(&client.join(LAMBDA_CPP), &cpp).map_err(NpmError::from)?;
    let template = cpp.join("src/version.cpp.in");
    let mut version = fs::read_to_string(&template).map_err(FileError::on("reading", &template))?;
    for (part, number) in LAMBDA_CPP_VERSION {
        version = version.replace(&format!("@PROJECT_VERSION_{part}@"), number);
    }
    let source = cpp.join("src/version.cpp");
    fs::write(&source, version).map_err(FileError::on("writing", &source))?;
    GXX.run(|command| {
        // Relative paths: none of this machine's get into the image.
        command.current_dir(client);
        command.args(["-std=c++17", "-DAWS_LAMBDA_LOG=0"]);
        // As node-gyp and the package's binding.gyp say.
        command.args(["-DNAPI_CPP_EXCEPTIONS", "-DBUILDING_NODE_EXTENSION"]);
        command.args(shared(headers)).arg("-isystem").arg(api);
        command.arg("-Ideps/aws-lambda-cpp/include");
        command.arg("src/rapid-client.cc");
        for source in ["runtime", "logging", "version"] {
            command.arg(format!("deps/aws-lambda-cpp/src/{source}.cpp"));
        }
        command.arg(tree.join(LIBRARIES).join("libcurl.so.4"));
        command.arg("-o").arg(addon);
    })?;
    Ok(())
}

fn compile_identity(
    scratch: &Path,
    headers: &Path,
    tree: &Path,
    addon: &Path,
) -> Result<(), ImageError> {
    let source = scratch.join("thaw_identity.c");
    fs::write(&source, IDENTITY).map_err(FileError::on("writing", &source))?;
    GXX.run(|command| {
        command.current_dir(scratch).args(shared(headers));
        command.args(["-x", "c", "thaw_identity.c", "-x", "none"]);
        command.arg(tree.join(LIBRARIES).join("libcrypto.so.3"));
        command.arg("-o").arg(addon);
    })?;
    Ok(())
}

/// What both are compiled with: no debugging information, no paths, no exported names but the module's own.
fn shared(headers: &Path) -> Vec<std::ffi::OsString> {
    let mut arguments: Vec<std::ffi::OsString> = [
        "-O2",
        "-fPIC",
        "-shared",
        "-s",
        "-fvisibility=hidden",
        "-Wl,-z,now",
        "-w",
    ]
    .map(Into::into)
    .to_vec();
    for folder in ["node", "", "x86_64-linux-gnu"] {
        arguments.push("-isystem".into());
        arguments.push(headers.join(folder).into());
    }
    arguments
}

/// Lets the image's own loader find all libraries and symbol versions of an addon: one that a newer distribution's compiler
/// made would be refused here, not in a guest.
fn check(addon: &Path, tree: &Path) -> Result<(), ImageError> {
    let libraries = tree.join(LIBRARIES);
    let listing = LOADER.run(|command| {
        command.arg(libraries.join("ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(&libraries);
        command.arg("--list").arg(addon);
    })?;
    let listing = String::from_utf8_lossy(&listing);
    match listing.lines().find(|line| line.contains("not found")) {
        Some(line) => Err(ImageError::Addon {
            addon: addon
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            line: line.trim().to_owned(),
        }),
        None => Ok(()),
    }
}
