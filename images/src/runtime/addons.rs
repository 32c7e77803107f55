//! Native parts of the Node.js image, compiled by this machine's compiler against the image's own libraries and headers.
//!
//! The Lambda client's is compiled from its package's own sources, but for curl: it links the distribution's libcurl, which
//! gets security updates, where the package's own build would link the old one that it carries. Both parts know Node.js by its
//! stable interface for addons alone; what else they need of it they find in the program when they are loaded.

use std::fs;
use std::path::{Path, PathBuf};

use super::ImageError;
use super::npm::{AWS_LAMBDA_RIC_3, NODE_ADDON_API, NpmError, untar};
use super::recipe::{IDENTITY, Recipe};
use super::table::NodeClient;
use super::wheels::{NODEJS_FOLDER, Wheel};
use crate::apt::{Apt, Package};
use crate::fault::FileError;
use crate::staging::{Staging, make_dir};
use crate::tool::{GXX, LOADER};

/// The C++ part of the Lambda client, in its package, and the version that it tells the Runtime API.
const LAMBDA_CPP: &str = "deps/aws-lambda-cpp-0.2.8.tar.gz";
const LAMBDA_CPP_VERSION: [(&str, &str); 3] = [("MAJOR", "0"), ("MINOR", "2"), ("PATCH", "8")];

/// What of the client's package is in the image beside `index.mjs`.
const KEPT: [&str; 4] = ["package.json", "LICENSE", "NOTICE", "THIRD-PARTY-LICENSES"];

const CLIENT_FOLDER: &str = "var/runtime/node_modules/aws-lambda-ric";
const CLIENT_ADDON: &str = "rapid-client.node";
const PROGRAM: &str = "var/lang/bin/node";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// Puts Node.js, where no package has it, its Lambda client, and what renews OpenSSL's generator, into `tree`.
pub(super) fn build(
    recipe: &Recipe,
    client: &NodeClient,
    apt: &Apt,
    staging: &Staging,
    tree: &Path,
) -> Result<(), ImageError> {
    let scratch = staging.path().join("addons");
    let headers = unpack_headers(recipe, apt, &scratch)?;
    if let Some(wheel) = &recipe.node {
        unpack_node(wheel, &apt.root().join("wheels"), &scratch, &headers, tree)?;
    }
    let cache = apt.root().join("npm");
    let package = client.package.unpack(&cache, &scratch.join("client"))?;
    let sources = AWS_LAMBDA_RIC_3.unpack(&cache, &scratch)?;
    let api = NODE_ADDON_API.unpack(&cache, &scratch)?;
    let folder = Path::new(client.folder);
    let kept = KEPT.iter().map(PathBuf::from);
    for file in kept.chain([folder.join("index.mjs")]) {
        let to = tree.join(CLIENT_FOLDER).join(&file);
        copy(&package.join(&file), &to)?;
    }
    let addon = tree.join(CLIENT_FOLDER).join(folder.join(CLIENT_ADDON));
    compile_client(&sources, &api, &headers, tree, &addon)?;
    let identity = tree.join("var/runtime/thaw_identity.node");
    compile_identity(&scratch, &headers, &identity)?;
    for addon in [&addon, &identity] {
        check(addon, tree)?;
    }
    Ok(())
}

/// Puts the program into `tree`, and its headers beside others.
fn unpack_node(
    wheel: &Wheel,
    cache: &Path,
    scratch: &Path,
    headers: &Path,
    tree: &Path,
) -> Result<(), ImageError> {
    let folder = scratch.join("node");
    wheel.unpack(cache, &folder, "/")?;
    let folder = folder.join(NODEJS_FOLDER);
    copy(&folder.join("bin/node"), &tree.join(PROGRAM))?;
    let to = headers.join("node");
    fs::rename(folder.join("include/node"), &to).map_err(FileError::on("moving to", &to))?;
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
        command.args(["-std=c++20", "-DAWS_LAMBDA_LOG=0"]);
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

fn compile_identity(scratch: &Path, headers: &Path, addon: &Path) -> Result<(), ImageError> {
    let source = scratch.join("thaw_identity.c");
    fs::write(&source, IDENTITY).map_err(FileError::on("writing", &source))?;
    GXX.run(|command| {
        command.current_dir(scratch).args(shared(headers));
        command.args(["-x", "c", "thaw_identity.c"]);
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
