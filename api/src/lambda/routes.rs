//! The operations of the Lambda REST API, all of them, and which of them this gateway serves.
//!
//! Names, methods and paths are those of the public service model `lambda/2015-03-31`.

use percent_encoding::percent_decode_str;

/// Operations served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the service model's names say what they are")]
pub enum Operation {
    AddLayerVersionPermission,
    AddPermission,
    CreateAlias,
    CreateFunction,
    CreateFunctionUrlConfig,
    DeleteAlias,
    DeleteCodeSigningConfig,
    DeleteEventSourceMapping,
    DeleteFunction,
    DeleteFunctionCodeSigningConfig,
    DeleteFunctionConcurrency,
    DeleteFunctionEventInvokeConfig,
    DeleteFunctionUrlConfig,
    DeleteLayerVersion,
    DeleteProvisionedConcurrencyConfig,
    GetAccountSettings,
    GetAlias,
    GetCodeSigningConfig,
    GetEventSourceMapping,
    GetFunction,
    GetFunctionCodeSigningConfig,
    GetFunctionConcurrency,
    GetFunctionConfiguration,
    GetFunctionEventInvokeConfig,
    GetFunctionRecursionConfig,
    GetFunctionUrlConfig,
    GetLayerVersion,
    GetLayerVersionByArn,
    GetLayerVersionPolicy,
    GetPolicy,
    GetProvisionedConcurrencyConfig,
    GetRuntimeManagementConfig,
    Invoke,
    InvokeAsync,
    InvokeWithResponseStream,
    ListAliases,
    ListCodeSigningConfigs,
    ListEventSourceMappings,
    ListFunctionEventInvokeConfigs,
    ListFunctionUrlConfigs,
    ListFunctions,
    ListFunctionsByCodeSigningConfig,
    ListLayerVersions,
    ListLayers,
    ListProvisionedConcurrencyConfigs,
    ListTags,
    ListVersionsByFunction,
    PublishLayerVersion,
    PublishVersion,
    PutFunctionCodeSigningConfig,
    PutFunctionConcurrency,
    PutFunctionEventInvokeConfig,
    PutFunctionRecursionConfig,
    PutProvisionedConcurrencyConfig,
    PutRuntimeManagementConfig,
    RemoveLayerVersionPermission,
    RemovePermission,
    TagResource,
    UntagResource,
    UpdateAlias,
    UpdateCodeSigningConfig,
    UpdateEventSourceMapping,
    UpdateFunctionCode,
    UpdateFunctionConfiguration,
    UpdateFunctionEventInvokeConfig,
    UpdateFunctionUrlConfig,
}

/// One operation of the service model.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// Its name in the service model.
    pub name: &'static str,
    /// The HTTP method.
    pub method: &'static str,
    /// The path; a `{…}` stands for one percent-encoded segment. What follows a `?` must be in the query.
    pub path: &'static str,
    /// What serves it; `None` when nothing does.
    pub operation: Option<Operation>,
}

const fn route(
    name: &'static str,
    method: &'static str,
    path: &'static str,
    operation: Option<Operation>,
) -> Route {
    Route {
        name,
        method,
        path,
        operation,
    }
}

/// All operations, ordered by name.
#[rustfmt::skip]
pub const ROUTES: &[Route] = &[
    route("AddLayerVersionPermission", "POST", "/2018-10-31/layers/{LayerName}/versions/{VersionNumber}/policy", Some(Operation::AddLayerVersionPermission)),
    route("AddPermission", "POST", "/2015-03-31/functions/{FunctionName}/policy", Some(Operation::AddPermission)),
    route("CheckpointDurableExecution", "POST", "/2025-12-01/durable-executions/{DurableExecutionArn}/checkpoint", None),
    route("CreateAlias", "POST", "/2015-03-31/functions/{FunctionName}/aliases", Some(Operation::CreateAlias)),
    route("CreateCapacityProvider", "POST", "/2025-11-30/capacity-providers", None),
    route("CreateCodeSigningConfig", "POST", "/2020-04-22/code-signing-configs", None),
    route("CreateEventSourceMapping", "POST", "/2015-03-31/event-source-mappings", None),
    route("CreateFunction", "POST", "/2015-03-31/functions", Some(Operation::CreateFunction)),
    route("CreateFunctionUrlConfig", "POST", "/2021-10-31/functions/{FunctionName}/url", Some(Operation::CreateFunctionUrlConfig)),
    route("DeleteAlias", "DELETE", "/2015-03-31/functions/{FunctionName}/aliases/{Name}", Some(Operation::DeleteAlias)),
    route("DeleteCapacityProvider", "DELETE", "/2025-11-30/capacity-providers/{CapacityProviderName}", None),
    route("DeleteCodeSigningConfig", "DELETE", "/2020-04-22/code-signing-configs/{CodeSigningConfigArn}", Some(Operation::DeleteCodeSigningConfig)),
    route("DeleteDurableExecution", "DELETE", "/2025-12-01/durable-executions/{DurableExecutionArn}", None),
    route("DeleteEventSourceMapping", "DELETE", "/2015-03-31/event-source-mappings/{UUID}", Some(Operation::DeleteEventSourceMapping)),
    route("DeleteFunction", "DELETE", "/2015-03-31/functions/{FunctionName}", Some(Operation::DeleteFunction)),
    route("DeleteFunctionCodeSigningConfig", "DELETE", "/2020-06-30/functions/{FunctionName}/code-signing-config", Some(Operation::DeleteFunctionCodeSigningConfig)),
    route("DeleteFunctionConcurrency", "DELETE", "/2017-10-31/functions/{FunctionName}/concurrency", Some(Operation::DeleteFunctionConcurrency)),
    route("DeleteFunctionEventInvokeConfig", "DELETE", "/2019-09-25/functions/{FunctionName}/event-invoke-config", Some(Operation::DeleteFunctionEventInvokeConfig)),
    route("DeleteFunctionUrlConfig", "DELETE", "/2021-10-31/functions/{FunctionName}/url", Some(Operation::DeleteFunctionUrlConfig)),
    route("DeleteLayerVersion", "DELETE", "/2018-10-31/layers/{LayerName}/versions/{VersionNumber}", Some(Operation::DeleteLayerVersion)),
    route("DeleteProvisionedConcurrencyConfig", "DELETE", "/2019-09-30/functions/{FunctionName}/provisioned-concurrency", Some(Operation::DeleteProvisionedConcurrencyConfig)),
    route("DeleteResourcePolicy", "DELETE", "/2026-07-09/resource-policy/{ResourceArn}", None),
    route("GetAccountSettings", "GET", "/2016-08-19/account-settings", Some(Operation::GetAccountSettings)),
    route("GetAlias", "GET", "/2015-03-31/functions/{FunctionName}/aliases/{Name}", Some(Operation::GetAlias)),
    route("GetCapacityProvider", "GET", "/2025-11-30/capacity-providers/{CapacityProviderName}", None),
    route("GetCodeSigningConfig", "GET", "/2020-04-22/code-signing-configs/{CodeSigningConfigArn}", Some(Operation::GetCodeSigningConfig)),
    route("GetDurableExecution", "GET", "/2025-12-01/durable-executions/{DurableExecutionArn}", None),
    route("GetDurableExecutionHistory", "GET", "/2025-12-01/durable-executions/{DurableExecutionArn}/history", None),
    route("GetDurableExecutionState", "GET", "/2025-12-01/durable-executions/{DurableExecutionArn}/state", None),
    route("GetEventSourceMapping", "GET", "/2015-03-31/event-source-mappings/{UUID}", Some(Operation::GetEventSourceMapping)),
    route("GetFunction", "GET", "/2015-03-31/functions/{FunctionName}", Some(Operation::GetFunction)),
    route("GetFunctionCodeSigningConfig", "GET", "/2020-06-30/functions/{FunctionName}/code-signing-config", Some(Operation::GetFunctionCodeSigningConfig)),
    route("GetFunctionConcurrency", "GET", "/2019-09-30/functions/{FunctionName}/concurrency", Some(Operation::GetFunctionConcurrency)),
    route("GetFunctionConfiguration", "GET", "/2015-03-31/functions/{FunctionName}/configuration", Some(Operation::GetFunctionConfiguration)),
    route("GetFunctionEventInvokeConfig", "GET", "/2019-09-25/functions/{FunctionName}/event-invoke-config", Some(Operation::GetFunctionEventInvokeConfig)),
    route("GetFunctionRecursionConfig", "GET", "/2024-08-31/functions/{FunctionName}/recursion-config", Some(Operation::GetFunctionRecursionConfig)),
    route("GetFunctionScalingConfig", "GET", "/2025-11-30/functions/{FunctionName}/function-scaling-config", None),
    route("GetFunctionUrlConfig", "GET", "/2021-10-31/functions/{FunctionName}/url", Some(Operation::GetFunctionUrlConfig)),
    route("GetLayerVersion", "GET", "/2018-10-31/layers/{LayerName}/versions/{VersionNumber}", Some(Operation::GetLayerVersion)),
    route("GetLayerVersionByArn", "GET", "/2018-10-31/layers?find=LayerVersion", Some(Operation::GetLayerVersionByArn)),
    route("GetLayerVersionPolicy", "GET", "/2018-10-31/layers/{LayerName}/versions/{VersionNumber}/policy", Some(Operation::GetLayerVersionPolicy)),
    route("GetPolicy", "GET", "/2015-03-31/functions/{FunctionName}/policy", Some(Operation::GetPolicy)),
    route("GetProvisionedConcurrencyConfig", "GET", "/2019-09-30/functions/{FunctionName}/provisioned-concurrency", Some(Operation::GetProvisionedConcurrencyConfig)),
    route("GetResourcePolicy", "GET", "/2026-07-09/resource-policy/{ResourceArn}", None),
    route("GetRuntimeManagementConfig", "GET", "/2021-07-20/functions/{FunctionName}/runtime-management-config", Some(Operation::GetRuntimeManagementConfig)),
    route("Invoke", "POST", "/2015-03-31/functions/{FunctionName}/invocations", Some(Operation::Invoke)),
    route("InvokeAsync", "POST", "/2014-11-13/functions/{FunctionName}/invoke-async", Some(Operation::InvokeAsync)),
    route("InvokeWithResponseStream", "POST", "/2021-11-15/functions/{FunctionName}/response-streaming-invocations", Some(Operation::InvokeWithResponseStream)),
    route("ListAliases", "GET", "/2015-03-31/functions/{FunctionName}/aliases", Some(Operation::ListAliases)),
    route("ListCapacityProviders", "GET", "/2025-11-30/capacity-providers", None),
    route("ListCodeSigningConfigs", "GET", "/2020-04-22/code-signing-configs", Some(Operation::ListCodeSigningConfigs)),
    route("ListDurableExecutionsByFunction", "GET", "/2025-12-01/functions/{FunctionName}/durable-executions", None),
    route("ListEventSourceMappings", "GET", "/2015-03-31/event-source-mappings", Some(Operation::ListEventSourceMappings)),
    route("ListFunctionEventInvokeConfigs", "GET", "/2019-09-25/functions/{FunctionName}/event-invoke-config/list", Some(Operation::ListFunctionEventInvokeConfigs)),
    route("ListFunctionUrlConfigs", "GET", "/2021-10-31/functions/{FunctionName}/urls", Some(Operation::ListFunctionUrlConfigs)),
    route("ListFunctionVersionsByCapacityProvider", "GET", "/2025-11-30/capacity-providers/{CapacityProviderName}/function-versions", None),
    route("ListFunctions", "GET", "/2015-03-31/functions", Some(Operation::ListFunctions)),
    route("ListFunctionsByCodeSigningConfig", "GET", "/2020-04-22/code-signing-configs/{CodeSigningConfigArn}/functions", Some(Operation::ListFunctionsByCodeSigningConfig)),
    route("ListLayerVersions", "GET", "/2018-10-31/layers/{LayerName}/versions", Some(Operation::ListLayerVersions)),
    route("ListLayers", "GET", "/2018-10-31/layers", Some(Operation::ListLayers)),
    route("ListProvisionedConcurrencyConfigs", "GET", "/2019-09-30/functions/{FunctionName}/provisioned-concurrency?List=ALL", Some(Operation::ListProvisionedConcurrencyConfigs)),
    route("ListTags", "GET", "/2017-03-31/tags/{Resource}", Some(Operation::ListTags)),
    route("ListVersionsByFunction", "GET", "/2015-03-31/functions/{FunctionName}/versions", Some(Operation::ListVersionsByFunction)),
    route("PauseDurableExecution", "POST", "/2025-12-01/durable-executions/{DurableExecutionArn}/pause", None),
    route("PublishLayerVersion", "POST", "/2018-10-31/layers/{LayerName}/versions", Some(Operation::PublishLayerVersion)),
    route("PublishVersion", "POST", "/2015-03-31/functions/{FunctionName}/versions", Some(Operation::PublishVersion)),
    route("PutFunctionCodeSigningConfig", "PUT", "/2020-06-30/functions/{FunctionName}/code-signing-config", Some(Operation::PutFunctionCodeSigningConfig)),
    route("PutFunctionConcurrency", "PUT", "/2017-10-31/functions/{FunctionName}/concurrency", Some(Operation::PutFunctionConcurrency)),
    route("PutFunctionEventInvokeConfig", "PUT", "/2019-09-25/functions/{FunctionName}/event-invoke-config", Some(Operation::PutFunctionEventInvokeConfig)),
    route("PutFunctionRecursionConfig", "PUT", "/2024-08-31/functions/{FunctionName}/recursion-config", Some(Operation::PutFunctionRecursionConfig)),
    route("PutFunctionScalingConfig", "PUT", "/2025-11-30/functions/{FunctionName}/function-scaling-config", None),
    route("PutProvisionedConcurrencyConfig", "PUT", "/2019-09-30/functions/{FunctionName}/provisioned-concurrency", Some(Operation::PutProvisionedConcurrencyConfig)),
    route("PutResourcePolicy", "PUT", "/2026-07-09/resource-policy/{ResourceArn}", None),
    route("PutRuntimeManagementConfig", "PUT", "/2021-07-20/functions/{FunctionName}/runtime-management-config", Some(Operation::PutRuntimeManagementConfig)),
    route("RemoveLayerVersionPermission", "DELETE", "/2018-10-31/layers/{LayerName}/versions/{VersionNumber}/policy/{StatementId}", Some(Operation::RemoveLayerVersionPermission)),
    route("RemovePermission", "DELETE", "/2015-03-31/functions/{FunctionName}/policy/{StatementId}", Some(Operation::RemovePermission)),
    route("ResumeDurableExecution", "POST", "/2025-12-01/durable-executions/{DurableExecutionArn}/resume", None),
    route("SendDurableExecutionCallbackFailure", "POST", "/2025-12-01/durable-execution-callbacks/{CallbackId}/fail", None),
    route("SendDurableExecutionCallbackHeartbeat", "POST", "/2025-12-01/durable-execution-callbacks/{CallbackId}/heartbeat", None),
    route("SendDurableExecutionCallbackSuccess", "POST", "/2025-12-01/durable-execution-callbacks/{CallbackId}/succeed", None),
    route("StopDurableExecution", "POST", "/2025-12-01/durable-executions/{DurableExecutionArn}/stop", None),
    route("TagResource", "POST", "/2017-03-31/tags/{Resource}", Some(Operation::TagResource)),
    route("UntagResource", "DELETE", "/2017-03-31/tags/{Resource}", Some(Operation::UntagResource)),
    route("UpdateAlias", "PUT", "/2015-03-31/functions/{FunctionName}/aliases/{Name}", Some(Operation::UpdateAlias)),
    route("UpdateCapacityProvider", "PUT", "/2025-11-30/capacity-providers/{CapacityProviderName}", None),
    route("UpdateCodeSigningConfig", "PUT", "/2020-04-22/code-signing-configs/{CodeSigningConfigArn}", Some(Operation::UpdateCodeSigningConfig)),
    route("UpdateEventSourceMapping", "PUT", "/2015-03-31/event-source-mappings/{UUID}", Some(Operation::UpdateEventSourceMapping)),
    route("UpdateFunctionCode", "PUT", "/2015-03-31/functions/{FunctionName}/code", Some(Operation::UpdateFunctionCode)),
    route("UpdateFunctionConfiguration", "PUT", "/2015-03-31/functions/{FunctionName}/configuration", Some(Operation::UpdateFunctionConfiguration)),
    route("UpdateFunctionEventInvokeConfig", "POST", "/2019-09-25/functions/{FunctionName}/event-invoke-config", Some(Operation::UpdateFunctionEventInvokeConfig)),
    route("UpdateFunctionUrlConfig", "PUT", "/2021-10-31/functions/{FunctionName}/url", Some(Operation::UpdateFunctionUrlConfig)),
];

/// What a request asks for.
#[derive(Debug)]
pub struct Matched {
    /// The operation.
    pub route: &'static Route,
    /// The segments that the path leaves open, decoded, in their order.
    pub names: Vec<String>,
}

/// Finds the operation of a request. An optional trailing slash is what older clients write. `None` for what is no operation
/// of the service model.
#[must_use]
pub fn find(method: &str, path: &str, query: &str) -> Option<Matched> {
    let path = path.strip_suffix('/').unwrap_or(path);
    let matching = ROUTES.iter().filter(|route| route.method == method);
    let mut found = None;
    for route in matching {
        let (template, wanted) = route.path.split_once('?').unwrap_or((route.path, ""));
        if !query.split('&').any(|pair| pair == wanted) && !wanted.is_empty() {
            continue;
        }
        if let Some(names) = names(template, path) {
            found = Some(Matched { route, names });
            // One that asks for something in the query says more than one that does not.
            if !wanted.is_empty() {
                break;
            }
        }
    }
    found
}

fn names(template: &str, path: &str) -> Option<Vec<String>> {
    let (mut wanted, mut given) = (template.split('/'), path.split('/'));
    let mut names = Vec::new();
    loop {
        match (wanted.next(), given.next()) {
            (None, None) => return Some(names),
            (Some(wanted), Some(given)) if wanted.starts_with('{') && !given.is_empty() => {
                names.push(percent_decode_str(given).decode_utf8().ok()?.into_owned());
            }
            (Some(wanted), Some(given)) if wanted == given => {}
            _ => return None,
        }
    }
}

/// Whether a path looks like one of the API, which begin with a date.
#[must_use]
pub fn is_api(path: &str) -> bool {
    let first = path.split('/').nth(1).unwrap_or_default();
    first.len() == 10
        && first.bytes().enumerate().all(|(index, byte)| match index {
            4 | 7 => byte == b'-',
            _ => byte.is_ascii_digit(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(method: &str, path: &str, query: &str) -> Option<(&'static str, Vec<String>)> {
        find(method, path, query).map(|found| (found.route.name, found.names))
    }

    #[test]
    fn paths_are_operations_with_or_without_a_trailing_slash() {
        for slash in ["", "/"] {
            let list = format!("/2015-03-31/functions{slash}");
            assert_eq!(of("GET", &list, ""), Some(("ListFunctions", vec![])));
            assert_eq!(of("POST", &list, ""), Some(("CreateFunction", vec![])));
            assert_eq!(of("PATCH", &list, ""), None);
            let invoke = format!("/2015-03-31/functions/f/invocations{slash}");
            let named = vec!["f".to_owned()];
            assert_eq!(of("POST", &invoke, "Qualifier=1"), Some(("Invoke", named)));
        }
        let arn =
            "/2015-03-31/functions/arn%3Aaws%3Alambda%3Aus-east-1%3A0%3Afunction%3Af%3A%24LATEST";
        let name = "arn:aws:lambda:us-east-1:0:function:f:$LATEST".to_owned();
        assert_eq!(of("GET", arn, ""), Some(("GetFunction", vec![name])));
        assert_eq!(of("GET", "/2015-03-31/functions/%FF", ""), None);
        assert_eq!(of("GET", "/2015-03-31/functions//aliases", ""), None);
        assert!(!is_api("/") && !is_api("/favicon.ico") && is_api("/2015-03-31/nothing"));
    }

    #[test]
    fn the_query_tells_operations_on_one_path_apart() {
        let path = "/2019-09-30/functions/f/provisioned-concurrency";
        let named = || vec!["f".to_owned()];
        assert_eq!(
            of("GET", path, "Qualifier=1"),
            Some(("GetProvisionedConcurrencyConfig", named()))
        );
        assert_eq!(
            of("GET", path, "MaxItems=1&List=ALL"),
            Some(("ListProvisionedConcurrencyConfigs", named()))
        );
        let layers = "/2018-10-31/layers";
        assert_eq!(of("GET", layers, ""), Some(("ListLayers", vec![])));
        assert_eq!(
            of("GET", layers, "find=LayerVersion&Arn=a"),
            Some(("GetLayerVersionByArn", vec![]))
        );
    }
}
