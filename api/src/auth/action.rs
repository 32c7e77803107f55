//! Which action a request is, for permissions and for what a body may weigh. Pure.
//!
//! What is not known here counts as managing everything, so a route that this table forgets is closed to keys that may less.

use axum::http::Method;
use percent_encoding::percent_decode_str;

use crate::invocation::PAYLOAD_BYTES_MAX;
use crate::lambda::CODE_BODY_BYTES_MAX;
use crate::lambda::names::FunctionRef;
use crate::lambda::routes::{self, Matched};

/// Largest body of what neither carries code nor calls a function, bytes.
const BODY_BYTES_MAX: usize = 1024 * 1024;

/// What a key must be allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// To call functions.
    Invoke,
    /// To do everything that is done with functions.
    Manage,
    /// To do everything, keys included.
    All,
}

/// What an action is done with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// This function, by its bare name.
    Function(String),
    /// The function that the body names as `FunctionName`.
    InBody,
    /// All functions, or none.
    Everything,
}

/// What a body may weigh, and how a larger one is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyLimit {
    /// Bytes.
    pub bytes: usize,
    /// How it is used.
    pub kind: BodyKind,
}

/// What a body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyKind {
    /// A function's code: held until the request is done.
    Code,
    /// A function's event.
    Event,
    /// Settings.
    Settings,
}

/// An action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Action {
    /// As IAM spells it: `lambda:CreateFunction`.
    pub name: String,
    /// What a key must be allowed.
    pub need: Need,
    /// What it is done with.
    pub target: Target,
    /// What its body may weigh.
    pub limit: BodyLimit,
}

impl Action {
    /// The call of a function by its URL.
    #[must_use]
    pub fn url(function: &str) -> Self {
        let target = Target::Function(function.to_owned());
        Self::new("lambda:InvokeFunctionUrl", Need::Invoke, target, event())
    }

    /// The action of a request that is no call of a function URL.
    #[must_use]
    pub fn of(method: &Method, path: &str, query: &str) -> Self {
        let path = path.strip_suffix('/').unwrap_or(path);
        if let Some(rest) = path.strip_prefix("/thaw/v1/") {
            let rest = percent_decode_str(rest).decode_utf8_lossy();
            return Self::of_thaw(method, &rest.split('/').collect::<Vec<_>>());
        }
        routes::find(method.as_str(), path, query)
            .and_then(|found| Self::of_lambda(&found))
            .unwrap_or_else(|| {
                let name = format!("lambda:{method}");
                Self::new(&name, Need::Manage, Target::Everything, settings())
            })
    }

    fn of_thaw(method: &Method, rest: &[&str]) -> Self {
        let (need, target) = match rest {
            ["keys", ..] => (Need::All, Target::Everything),
            ["functions", name, ..] => (Need::Manage, Target::Function((*name).to_owned())),
            _ => (Need::Manage, Target::Everything),
        };
        let name = match (method.as_str(), rest) {
            ("GET", ["keys"]) => "thaw:ListKeys",
            ("POST", ["keys"]) => "thaw:CreateKey",
            ("DELETE", ["keys", _]) => "thaw:DeleteKey",
            (_, ["keys", ..]) => "thaw:UpdateKey",
            ("GET", ["functions"]) => "thaw:ListFunctions",
            (_, ["functions", _, "logs"]) => "thaw:GetLogs",
            (_, ["functions", _, "code"]) => "thaw:GetCode",
            (_, ["functions", ..]) => "thaw:GetFunction",
            (_, ["layers", ..]) => "thaw:GetLayerCode",
            _ => "thaw:Manage",
        };
        Self::new(name, need, target, settings())
    }

    /// An operation of the Lambda API. `None` if it names a function in a way that names none.
    fn of_lambda(found: &Matched) -> Option<Self> {
        let route = found.route;
        let (need, limit) = match route.name {
            "Invoke" | "InvokeAsync" | "InvokeWithResponseStream" => (Need::Invoke, event()),
            "CreateFunction" | "UpdateFunctionCode" | "PublishLayerVersion" => {
                (Need::Manage, code())
            }
            _ => (Need::Manage, settings()),
        };
        let target = if route.name == "CreateFunction" {
            Target::InBody
        } else if route.path.contains("{FunctionName}") || route.path.contains("{Resource}") {
            let text = found.names.first()?;
            Target::Function(FunctionRef::parse(text, None).ok()?.name)
        } else {
            Target::Everything
        };
        // IAM knows one action for all ways to call.
        let name = match need {
            Need::Invoke => "InvokeFunction",
            _ => route.name,
        };
        Some(Self::new(&format!("lambda:{name}"), need, target, limit))
    }

    fn new(name: &str, need: Need, target: Target, limit: BodyLimit) -> Self {
        Self {
            name: name.to_owned(),
            need,
            target,
            limit,
        }
    }
}

fn code() -> BodyLimit {
    BodyLimit {
        bytes: CODE_BODY_BYTES_MAX,
        kind: BodyKind::Code,
    }
}

fn event() -> BodyLimit {
    BodyLimit {
        bytes: PAYLOAD_BYTES_MAX,
        kind: BodyKind::Event,
    }
}

fn settings() -> BodyLimit {
    BodyLimit {
        bytes: BODY_BYTES_MAX,
        kind: BodyKind::Settings,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(method: &str, path: &str) -> (String, Need, Target) {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let action = Action::of(&method, path, "");
        (action.name, action.need, action.target)
    }

    fn on(name: &str, need: Need, function: &str) -> (String, Need, Target) {
        (name.to_owned(), need, Target::Function(function.to_owned()))
    }

    #[test]
    fn operations_are_known_by_iams_names() {
        use Need::{All, Invoke, Manage};
        for (method, path, found) in [
            (
                "POST",
                "/2015-03-31/functions/f/invocations/",
                on("lambda:InvokeFunction", Invoke, "f"),
            ),
            (
                "POST",
                "/2014-11-13/functions/f/invoke-async",
                on("lambda:InvokeFunction", Invoke, "f"),
            ),
            (
                "POST",
                "/2021-11-15/functions/f:p/response-streaming-invocations",
                on("lambda:InvokeFunction", Invoke, "f"),
            ),
            (
                "GET",
                "/2015-03-31/functions/arn%3Aaws%3Alambda%3Aus-east-1%3A000000000000%3Afunction%3Af%3A1",
                on("lambda:GetFunction", Manage, "f"),
            ),
            (
                "POST",
                "/2017-03-31/tags/arn:aws:lambda:us-east-1:000000000000:function:f",
                on("lambda:TagResource", Manage, "f"),
            ),
            (
                "PUT",
                "/2015-03-31/functions/f/code",
                on("lambda:UpdateFunctionCode", Manage, "f"),
            ),
            (
                "GET",
                "/thaw/v1/functions/f/logs",
                on("thaw:GetLogs", Manage, "f"),
            ),
            (
                "POST",
                "/2015-03-31/functions",
                ("lambda:CreateFunction".to_owned(), Manage, Target::InBody),
            ),
            (
                "GET",
                "/2015-03-31/functions/",
                (
                    "lambda:ListFunctions".to_owned(),
                    Manage,
                    Target::Everything,
                ),
            ),
            (
                "POST",
                "/thaw/v1/keys",
                ("thaw:CreateKey".to_owned(), All, Target::Everything),
            ),
            (
                "DELETE",
                "/thaw/v1/keys/x",
                ("thaw:DeleteKey".to_owned(), All, Target::Everything),
            ),
            (
                "DELETE",
                "/thaw/v1/keys/x/y",
                ("thaw:UpdateKey".to_owned(), All, Target::Everything),
            ),
        ] {
            assert_eq!(of(method, path), found, "{method} {path}");
        }
    }

    #[test]
    fn what_is_unknown_takes_a_key_for_everything() {
        for (method, path) in [
            ("GET", "/"),
            ("GET", ""),
            ("POST", "/2015-03-31/functions//invocations"),
            ("POST", "/2015-03-31/functions/a%20b/invocations"),
            ("POST", "/2015-03-31/functions/f/invocations/x"),
            ("POST", "/2015-03-32/functions/f/invocations"),
            ("GET", "/2015-03-31/functions/f/invocations"),
            ("POST", "/2015-03-31/functions/%FF/invocations"),
            ("POST", "/x/2015-03-31/functions/f/invocations"),
        ] {
            let (_, need, target) = of(method, path);
            assert_eq!(
                (need, target),
                (Need::Manage, Target::Everything),
                "{method} {path}"
            );
        }
    }

    #[test]
    fn bodies_have_the_limits_of_their_operations() {
        let limit = |method: Method, path: &str| Action::of(&method, path, "").limit.bytes;
        assert_eq!(
            limit(Method::POST, "/2015-03-31/functions"),
            CODE_BODY_BYTES_MAX
        );
        assert_eq!(
            limit(Method::PUT, "/2015-03-31/functions/f/code"),
            CODE_BODY_BYTES_MAX
        );
        assert_eq!(
            limit(Method::POST, "/2015-03-31/functions/f/invocations"),
            PAYLOAD_BYTES_MAX
        );
        assert_eq!(limit(Method::POST, "/anything"), BODY_BYTES_MAX);
    }
}
