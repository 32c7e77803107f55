//! `FunctionName`: a name, a partial ARN or a full ARN, each with an optional qualifier. Pure.

use super::errors::{ApiError, violation};

/// Longest name of a function.
const NAME_CHARS_MAX: usize = 64;

/// Longest ARN.
const TEXT_CHARS_MAX: usize = 170;

/// The model's pattern, for error messages.
const PATTERN: &str = "Member must satisfy regular expression pattern: (arn:(aws[a-zA-Z-]*)?:lambda:)?([a-z]{2}((-gov)|(-iso([a-z]?)))?-[a-z]+-\\d{1}:)?(\\d{12}:)?(function:)?([a-zA-Z0-9-_]+)(:(\\$LATEST|[a-zA-Z0-9-_]+))?";

/// A function, as a client named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionRef {
    /// The bare name.
    pub name: String,
    /// What followed it, or the `Qualifier` parameter.
    pub qualifier: Option<String>,
    /// Region of an ARN that names one.
    pub region: Option<String>,
    /// Account of an ARN that names one.
    pub account: Option<String>,
}

impl FunctionRef {
    /// Reads a `FunctionName` and joins it with the `Qualifier` parameter.
    ///
    /// # Errors
    /// It fits no pattern, or the two qualifiers differ.
    pub fn parse(text: &str, qualifier: Option<&str>) -> Result<Self, ApiError> {
        let malformed =
            |constraint: &str| ApiError::validation(&[violation(text, "functionName", constraint)]);
        if text.is_empty() {
            return Err(malformed(
                "Member must have length greater than or equal to 1",
            ));
        }
        if text.len() > TEXT_CHARS_MAX {
            return Err(malformed(
                "Member must have length less than or equal to 170",
            ));
        }
        let mut found = tokens(text).ok_or_else(|| malformed(PATTERN))?;
        if found.name.len() > NAME_CHARS_MAX {
            return Err(malformed(
                "Member must have length less than or equal to 64",
            ));
        }
        // An empty parameter is what some clients send for none.
        let qualifier = qualifier.filter(|qualifier| !qualifier.is_empty());
        match (&found.qualifier, qualifier) {
            (Some(derived), Some(given)) if derived != given => {
                return Err(ApiError::invalid_parameter(
                    "The derived qualifier from the function name does not match the specified qualifier.",
                ));
            }
            (None, Some(given)) if is_qualifier(given) => found.qualifier = Some(given.to_owned()),
            (None, Some(given)) => {
                return Err(ApiError::validation(&[violation(
                    given,
                    "qualifier",
                    "Member must satisfy regular expression pattern: (|[a-zA-Z0-9$_-]+)",
                )]));
            }
            _ => {}
        }
        Ok(found)
    }
}

fn tokens(text: &str) -> Option<FunctionRef> {
    let mut parts: Vec<&str> = text.split(':').collect();
    if parts.first() == Some(&"arn") {
        let [_, partition, "lambda", rest @ ..] = parts.as_slice() else {
            return None;
        };
        let partition_is_known = partition.is_empty() || partition.starts_with("aws");
        if !partition_is_known || rest.len() < 4 {
            return None;
        }
        parts = rest.to_vec();
    }
    let mut parts = parts.as_slice();
    let mut take = |fits: fn(&str) -> bool| match parts {
        // What stands last is the name, whatever it looks like.
        [first, rest @ ..] if !rest.is_empty() && fits(first) => {
            parts = rest;
            Some((*first).to_owned())
        }
        _ => None,
    };
    let region = take(is_region);
    let account = take(|part| part.len() == 12 && part.bytes().all(|b| b.is_ascii_digit()));
    take(|part| part == "function");
    let (name, qualifier) = match parts {
        [name] => (*name, None),
        [name, qualifier] if is_qualifier(qualifier) => (*name, Some((*qualifier).to_owned())),
        _ => return None,
    };
    is_name(name).then(|| FunctionRef {
        name: name.to_owned(),
        qualifier,
        region,
        account,
    })
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

fn is_qualifier(text: &str) -> bool {
    text == "$LATEST" || (text.len() <= 128 && is_name(text))
}

/// As in `us-east-1` and `us-gov-west-1`.
fn is_region(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let words = |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase());
    match parts.as_slice() {
        [country, middle @ .., number] => {
            country.len() == 2
                && words(country)
                && (1..=2).contains(&middle.len())
                && middle.iter().all(words)
                && number.len() == 1
                && number.bytes().all(|b| b.is_ascii_digit())
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> (String, Option<String>) {
        let found = FunctionRef::parse(text, None).unwrap();
        (found.name, found.qualifier)
    }

    #[test]
    fn every_way_to_name_a_function_is_read() {
        let plain = ("my-fn".to_owned(), None);
        for text in [
            "my-fn",
            "function:my-fn",
            "000000000000:my-fn",
            "000000000000:function:my-fn",
            "us-east-1:000000000000:function:my-fn",
            "arn:aws:lambda:us-east-1:000000000000:function:my-fn",
            "arn:aws-us-gov:lambda:us-gov-west-1:000000000000:function:my-fn",
        ] {
            assert_eq!(parsed(text), plain, "{text}");
            let qualified = format!("{text}:$LATEST");
            assert_eq!(
                parsed(&qualified),
                ("my-fn".to_owned(), Some("$LATEST".to_owned())),
                "{qualified}"
            );
        }
        assert_eq!(parsed("function"), ("function".to_owned(), None));
        assert_eq!(parsed("123456789012"), ("123456789012".to_owned(), None));
        assert_eq!(parsed("f:prod"), ("f".to_owned(), Some("prod".to_owned())));
    }

    #[test]
    fn what_fits_no_pattern_is_a_validation_error() {
        for text in [
            "",
            "a b",
            "a:b:c",
            "arn:aws:lambda:f",
            "arn:aws:s3:::bucket",
            "a/b",
            "é",
            "f:",
            ":",
        ] {
            let error = FunctionRef::parse(text, None).unwrap_err();
            assert_eq!(error.code, "ValidationException", "{text}");
            assert!(
                error
                    .message
                    .starts_with("1 validation error detected: Value '")
            );
        }
        let long = FunctionRef::parse(&"x".repeat(65), None).unwrap_err();
        assert!(long.message.ends_with("less than or equal to 64"));
    }

    #[test]
    fn qualifiers_must_agree() {
        assert!(FunctionRef::parse("f:$LATEST", Some("$LATEST")).is_ok());
        let error = FunctionRef::parse("f:1", Some("2")).unwrap_err();
        assert_eq!(error.code, "InvalidParameterValueException");
        let found = FunctionRef::parse("f", Some("7")).unwrap();
        assert_eq!(found.qualifier.as_deref(), Some("7"));
        assert!(
            FunctionRef::parse("f", Some(""))
                .unwrap()
                .qualifier
                .is_none()
        );
        assert!(FunctionRef::parse("f", Some("a b")).is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,200}", qualifier in proptest::option::of(".{0,20}")) {
            let _ = FunctionRef::parse(&text, qualifier.as_deref());
        }

        #[test]
        fn every_legal_name_is_read_back(name in "[a-zA-Z0-9_-]{1,64}") {
            let arn = format!("arn:aws:lambda:us-east-1:000000000000:function:{name}");
            prop_assert_eq!(FunctionRef::parse(&arn, None).unwrap().name, name.clone());
            prop_assert_eq!(FunctionRef::parse(&name, None).unwrap().name, name);
        }
    }
}
