//! PublishLayerVersion, GetLayerVersion, GetLayerVersionByArn, ListLayers, ListLayerVersions, DeleteLayerVersion, and the
//! `Layers` of functions.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::{
    LayerContent, LayerItem, LayerVersionItem, LayerVersionResponse, ListLayerVersionsResponse,
    ListLayersResponse, PublishLayerVersionRequest,
};

use super::errors::{ApiError, violation};
use super::paging::Page;
use super::{Answer, CODE_BODY_BYTES_MAX, Call, change_error, empty, json, source, validate};
use crate::clock;
use crate::functions::{ChangeError, storage};
use crate::layers::{About, LayerVersion};
use crate::record::{LayerUse, Settings};
use crate::state::App;

pub(super) mod policy;

/// Most layers of a function.
const LAYERS_MAX: usize = 5;
/// Largest page of a list.
const ITEMS_MAX: usize = 50;
const NAME_CHARS_MAX: usize = 140;
const LICENSE_CHARS_MAX: usize = 512;
const RUNTIMES_MAX: usize = 15;

/// Runtimes that Lambda knows, which a layer may say it is for: the service model's.
pub(super) const RUNTIMES: [&str; 52] = [
    "nodejs",
    "nodejs4.3",
    "nodejs6.10",
    "nodejs8.10",
    "nodejs10.x",
    "nodejs12.x",
    "nodejs14.x",
    "nodejs16.x",
    "nodejs18.x",
    "nodejs20.x",
    "nodejs22.x",
    "nodejs24.x",
    "java8",
    "java8.al2",
    "java11",
    "java17",
    "java21",
    "java25",
    "python2.7",
    "python3.6",
    "python3.7",
    "python3.8",
    "python3.9",
    "python3.10",
    "python3.11",
    "python3.12",
    "python3.13",
    "python3.14",
    "dotnetcore1.0",
    "dotnetcore2.0",
    "dotnetcore2.1",
    "dotnetcore3.1",
    "dotnet6",
    "dotnet8",
    "dotnet10",
    "nodejs4.3-edge",
    "go1.x",
    "ruby2.5",
    "ruby2.7",
    "ruby3.2",
    "ruby3.3",
    "ruby3.4",
    "ruby4.0",
    "provided",
    "provided.al2",
    "provided.al2023",
    "nodejs26.x",
    "python3.15",
    "java8.al2023",
    "java11.al2023",
    "java17.al2023",
    "custom",
];

const NAME_PATTERN: &str = "Member must satisfy regular expression pattern: (arn:[a-zA-Z0-9-]+:lambda:[a-zA-Z0-9-]+:\\d{12}:layer:[a-zA-Z0-9-_]+)|[a-zA-Z0-9-_]+";
const ARN_PATTERN: &str = r"Member must satisfy regular expression pattern: (arn:(aws[a-zA-Z-]*)?:lambda:(eusc-)?[a-z]{2}((-gov)|(-iso([a-z]?)))?-[a-z]+-\d{1}:\d{12}:layer:[a-zA-Z0-9-_]+:[0-9]+)|(arn:[a-zA-Z0-9-]+:lambda:::awslayer:[a-zA-Z0-9-_]+)";

pub(super) async fn publish(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let _upload = app.uploads.acquire().await;
    let (base, caller) = (call.base(app), call.caller.clone());
    let request: PublishLayerVersionRequest = call
        .json(CODE_BODY_BYTES_MAX, "PublishLayerVersion")
        .await?;
    let name = layer_name(app, name)?;
    check(&request)?;
    let zip = source::zip(app, request.content.unwrap_or_default()).await?;
    let about = About {
        description: request.description.unwrap_or_default(),
        runtimes: request.compatible_runtimes,
        architectures: request.compatible_architectures,
        license: request.license_info,
    };
    let (caller, refused) = (caller.as_ref(), |error| change_error(app, &error));
    let bytes = u64::try_from(zip.len()).unwrap_or(u64::MAX);
    let _counted = storage::reserve(app, caller, bytes, None)
        .map_err(|exceeded| refused(ChangeError::Storage(exceeded)))?;
    let (number, version) = app
        .layers
        .publish(&app.store, &name, about, zip, storage::key_of(caller))
        .await
        .map_err(refused)?;
    let view = view(app, &base, &name, number, &version);
    json(StatusCode::CREATED, &view)
}

pub(super) fn get(app: &App, call: &Call, name: &str, number: &str) -> Answer {
    let (name, number) = (layer_name(app, name)?, version_number(number)?);
    found(app, call, &name, number)
}

pub(super) fn get_by_arn(app: &App, call: &Call) -> Answer {
    let arn = call.query("Arn").unwrap_or_default();
    let malformed = || ApiError::validation(&[violation(&arn, "arn", ARN_PATTERN)]);
    let parsed = VersionArn::parse(&arn).ok_or_else(malformed)?;
    if parsed.is_elsewhere(app) {
        return Err(unknown());
    }
    found(app, call, parsed.name, parsed.number)
}

fn found(app: &App, call: &Call, name: &str, number: u64) -> Answer {
    let version = app.layers.version(name, number).ok_or_else(unknown)?;
    let view = view(app, &call.base(app), name, number, &version);
    json(StatusCode::OK, &view)
}

pub(super) fn list(app: &App, call: &Call) -> Answer {
    let fits = Filter::of(call)?;
    let layers = app.layers.all();
    let entries = layers.iter().filter_map(|layer| {
        let mut newest = layer.versions.iter().rev();
        let (number, version) = newest.find(|(_, version)| fits.takes(version))?;
        let entry = LayerItem {
            layer_name: layer.name.clone(),
            layer_arn: arn(app, &layer.name),
            latest_matching_version: item(app, &layer.name, *number, version),
        };
        Some((layer.name.clone(), entry))
    });
    let (layers, next_marker) = Page::of_at_most(call, ITEMS_MAX)?.cut(entries);
    let body = ListLayersResponse {
        layers,
        next_marker,
    };
    json(StatusCode::OK, &body)
}

pub(super) fn list_versions(app: &App, call: &Call, name: &str) -> Answer {
    let (name, fits) = (layer_name(app, name)?, Filter::of(call)?);
    let layer = app.layers.find(&name).unwrap_or_default();
    let newest_first = layer.versions.iter().rev();
    let entries =
        newest_first
            .filter(|(_, version)| fits.takes(version))
            .map(|(number, version)| {
                // Pages go by ascending keys.
                let key = format!("{:020}", u64::MAX - number);
                (key, item(app, &name, *number, version))
            });
    let (layer_versions, next_marker) = Page::of_at_most(call, ITEMS_MAX)?.cut(entries);
    let body = ListLayerVersionsResponse {
        layer_versions,
        next_marker,
    };
    json(StatusCode::OK, &body)
}

/// One that is not there is no error.
pub(super) async fn delete(app: &App, name: &str, number: &str) -> Answer {
    let (name, number) = (layer_name(app, name)?, version_number(number)?);
    let deleted = app.layers.delete(&app.store, &name, number).await;
    deleted.map_err(|error| change_error(app, &ChangeError::Store(error)))?;
    Ok(empty(StatusCode::NO_CONTENT))
}

/// Gives a function the layers that a request names, all of them in their order; `None` leaves it those that it has.
pub(super) fn attach(
    app: &App,
    settings: &mut Settings,
    arns: Option<&[String]>,
) -> Result<(), ApiError> {
    let Some(arns) = arns else { return Ok(()) };
    let mut layers: Vec<LayerUse> = Vec::new();
    for text in arns {
        let Some(arn) = VersionArn::parse(text) else {
            let constraint = format!(
                "Member must satisfy constraint: [Member must have length less than or equal to 2048, Member must have length greater than or equal to 1, {ARN_PATTERN}, Member must not be null]"
            );
            let value = format!("[{}]", arns.join(", "));
            return Err(ApiError::validation(&[violation(
                &value,
                "layers",
                &constraint,
            )]));
        };
        if arn.region != app.region {
            return Err(ApiError::invalid_parameter(format!(
                "Layers are not in the same region as the function. Layers are expected to be in region {}.",
                app.region
            )));
        }
        if let Some(other) = layers.iter().find(|other| other.name == arn.name) {
            return Err(ApiError::invalid_parameter(format!(
                "Two different versions of the same layer are not allowed to be referenced in the same function. {} and {text} are versions of the same layer.",
                other.arn
            )));
        }
        let version = app.layers.version(arn.name, arn.number);
        let version = version.filter(|_| !arn.is_elsewhere(app));
        let version = version.ok_or_else(|| no_version(text))?;
        layers.push(LayerUse {
            arn: text.clone(),
            name: arn.name.to_owned(),
            number: arn.number,
            code: version.code,
        });
    }
    if layers.len() > LAYERS_MAX {
        return Err(ApiError::invalid_parameter(format!(
            "Cannot reference more than {LAYERS_MAX} layers."
        )));
    }
    settings.layers = layers;
    Ok(())
}

/// A function is to have a layer version that there is not.
pub(super) fn no_version(arn: &str) -> ApiError {
    ApiError::invalid_parameter(format!("Layer version {arn} does not exist."))
}

fn unknown() -> ApiError {
    ApiError::no_resource()
}

fn arn(app: &App, name: &str) -> String {
    format!(
        "arn:aws:lambda:{}:{}:layer:{name}",
        app.region, app.account_id
    )
}

fn version_arn(app: &App, name: &str, number: u64) -> String {
    format!("{}:{number}", arn(app, name))
}

fn view(
    app: &App,
    base: &str,
    name: &str,
    number: u64,
    version: &LayerVersion,
) -> LayerVersionResponse {
    LayerVersionResponse {
        content: LayerContent {
            location: format!("{base}/thaw/v1/layers/{name}/{number}/code"),
            code_sha256: version.code.sha256.clone(),
            code_size: version.code.bytes,
        },
        layer_arn: arn(app, name),
        version: item(app, name, number, version),
    }
}

fn item(app: &App, name: &str, number: u64, version: &LayerVersion) -> LayerVersionItem {
    let about = version.about.clone();
    LayerVersionItem {
        layer_version_arn: version_arn(app, name, number),
        version: number,
        description: about.description,
        created_date: clock::last_modified(version.created_unix_ms),
        compatible_runtimes: about.runtimes,
        compatible_architectures: about.architectures,
        license_info: about.license,
    }
}

/// Which versions a list has: those that say they are for what the client has.
struct Filter {
    runtime: Option<String>,
    architecture: Option<String>,
}

impl Filter {
    fn of(call: &Call) -> Result<Self, ApiError> {
        let member = |name: &str| call.query(name).filter(|value| !value.is_empty());
        let filter = Self {
            runtime: member("CompatibleRuntime"),
            architecture: member("CompatibleArchitecture"),
        };
        let mut violations = Vec::new();
        violations.extend(outside(
            filter.runtime.as_slice(),
            "compatibleRuntime",
            &RUNTIMES,
        ));
        violations.extend(outside(
            filter.architecture.as_slice(),
            "compatibleArchitecture",
            &validate::ARCHITECTURES,
        ));
        validate::finish(&violations)?;
        Ok(filter)
    }

    fn takes(&self, version: &LayerVersion) -> bool {
        let fits = |wanted: &Option<String>, said: &Option<Vec<String>>| {
            let said = said.as_deref().unwrap_or_default();
            wanted.as_ref().is_none_or(|wanted| said.contains(wanted))
        };
        fits(&self.runtime, &version.about.runtimes)
            && fits(&self.architecture, &version.about.architectures)
    }
}

fn outside(values: &[String], member: &str, known: &[&str]) -> Option<String> {
    let unknown = values
        .iter()
        .find(|value| !known.contains(&value.as_str()))?;
    let known = known.join(", ");
    let constraint = format!("Member must satisfy enum value set: [{known}]");
    Some(violation(unknown, member, &constraint))
}

/// The same of a list, which the error repeats whole.
fn list_outside(values: &[String], member: &str, known: &[&str]) -> Option<String> {
    if values.iter().all(|value| known.contains(&value.as_str())) {
        return None;
    }
    let constraint = format!("Member must satisfy enum value set: [{}]", known.join(", "));
    let shown = format!("[{}]", values.join(", "));
    Some(violation(&shown, member, &constraint))
}

fn check(request: &PublishLayerVersionRequest) -> Result<(), ApiError> {
    let mut violations = Vec::new();
    if request.content.is_none() {
        violations.push(validate::null("content"));
    }
    violations.extend(validate::long_description(request.description.as_deref()));
    let too_long = |member: &str, limit: usize| {
        format!(
            "Value at '{member}' failed to satisfy constraint: Member must have length less than or equal to {limit}"
        )
    };
    let license = request.license_info.as_deref().unwrap_or_default();
    if license.chars().count() > LICENSE_CHARS_MAX {
        violations.push(too_long("licenseInfo", LICENSE_CHARS_MAX));
    }
    let runtimes = request.compatible_runtimes.as_deref().unwrap_or_default();
    if runtimes.len() > RUNTIMES_MAX {
        violations.push(too_long("compatibleRuntimes", RUNTIMES_MAX));
    }
    violations.extend(list_outside(runtimes, "compatibleRuntimes", &RUNTIMES));
    let kinds = request.compatible_architectures.as_deref();
    let kinds = kinds.unwrap_or_default();
    if kinds.len() > validate::ARCHITECTURES.len() {
        violations.push(too_long(
            "compatibleArchitectures",
            validate::ARCHITECTURES.len(),
        ));
    }
    violations.extend(validate::unknown_architectures(
        "compatibleArchitectures",
        kinds,
    ));
    validate::finish(&violations)
}

/// The bare name of what a client named by a name or an ARN.
fn layer_name(app: &App, text: &str) -> Result<String, ApiError> {
    let malformed =
        |constraint: &str| ApiError::validation(&[violation(text, "layerName", constraint)]);
    let (name, is_elsewhere) = match text.starts_with("arn:") {
        false => (text, false),
        true => {
            // An ARN without a version.
            let first = format!("{text}:1");
            let parsed = VersionArn::parse(&first).ok_or_else(|| malformed(NAME_PATTERN))?;
            let name = text.rsplit(':').next().unwrap_or_default();
            (name, parsed.is_elsewhere(app))
        }
    };
    if !is_name(name) {
        return Err(malformed(NAME_PATTERN));
    }
    if name.len() > NAME_CHARS_MAX {
        return Err(malformed(
            "Member must have length less than or equal to 140",
        ));
    }
    match is_elsewhere {
        true => Err(unknown()),
        false => Ok(name.to_owned()),
    }
}

fn is_name(text: &str) -> bool {
    let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    !text.is_empty() && text.bytes().all(is_fit)
}

fn version_number(text: &str) -> Result<u64, ApiError> {
    match text.parse::<i64>().map(u64::try_from) {
        Ok(Ok(number)) if number > 0 => Ok(number),
        Ok(_) => Err(ApiError::invalid_parameter(
            "Layer Version Cannot be less than 1",
        )),
        Err(_) => Err(ApiError::validation(&[violation(
            text,
            "versionNumber",
            "Member must be a number",
        )])),
    }
}

/// `arn:aws:lambda:REGION:ACCOUNT:layer:NAME:NUMBER`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct VersionArn<'a> {
    region: &'a str,
    account: &'a str,
    name: &'a str,
    number: u64,
}

impl<'a> VersionArn<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let parts: Vec<&str> = text.split(':').collect();
        let [
            "arn",
            partition,
            "lambda",
            region,
            account,
            "layer",
            name,
            number,
        ] = parts.as_slice()
        else {
            return None;
        };
        let is_account = account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit());
        let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        let is_fit =
            is_account && is_number && [partition, region, name].map(|p| is_name(p)) == [true; 3];
        // A number beyond all that can be given names no version.
        is_fit.then(|| Self {
            region,
            account,
            name,
            number: number.parse().unwrap_or(u64::MAX),
        })
    }

    fn is_elsewhere(&self, app: &App) -> bool {
        self.region != app.region || self.account != app.account_id
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn arns_of_layer_versions_are_read() {
        let arn = VersionArn::parse("arn:aws:lambda:us-east-1:000000000000:layer:a-b_c:12");
        let arn = arn.unwrap();
        assert_eq!(
            (arn.region, arn.account, arn.name, arn.number),
            ("us-east-1", "000000000000", "a-b_c", 12)
        );
        for wrong in [
            "",
            "a",
            "a:1",
            "arn:aws:lambda:us-east-1:000000000000:layer:a",
            "arn:aws:lambda:us-east-1:000000000000:layer:a:x",
            "arn:aws:lambda:us-east-1:000000000000:layer:a:-1",
            "arn:aws:lambda:us-east-1:000000000000:layer:a/../b:1",
            "arn:aws:lambda:us-east-1:000000000000:function:a:1",
            "arn:aws:lambda:us-east-1:0:layer:a:1",
        ] {
            assert_eq!(VersionArn::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn numbers_of_versions_begin_at_one() {
        assert_eq!(version_number("3").unwrap(), 3);
        for (text, code) in [
            ("0", "InvalidParameterValueException"),
            ("-1", "InvalidParameterValueException"),
            ("x", "ValidationException"),
        ] {
            assert_eq!(version_number(text).unwrap_err().code, code, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_arn_panics_and_no_name_leaves_the_folder(text in "(arn|:|aws|lambda|layer|/|\\.\\.|[0-9a-z]){0,20}") {
            if let Some(arn) = VersionArn::parse(&text) {
                prop_assert!(!arn.name.contains(['/', '.']));
            }
        }
    }
}
