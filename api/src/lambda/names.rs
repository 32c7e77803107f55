//! `FunctionName`: a name, a partial ARN or a full ARN, each with an optional qualifier. Pure.

use super::errors::{ApiError, violation};

/// Longest name of a new function.
const NAME_CHARS_MAX: usize = 64;

/// Longest ARN of a function that is looked for.
const TEXT_CHARS_MAX: usize = 256;

/// Longest ARN of a function that is made.
const NEW_TEXT_CHARS_MAX: usize = 140;

/// Longest qualifier.
const QUALIFIER_CHARS_MAX: usize = 128;

/// The model's pattern of functions that are looked for, for error messages.
const PATTERN: &str = r"Member must satisfy regular expression pattern: (arn:(aws[a-zA-Z-]*)?:lambda:)?((eusc-)?[a-z]{2}((-gov)|(-iso([a-z]?)))?-[a-z]+-\d{1}:)?(\d{12}:)?(function:)?([a-zA-Z0-9-_\.]+)(:(\$LATEST(\.PUBLISHED)?|[a-zA-Z0-9-_]+))?";

/// The same of functions that are made.
const NEW_PATTERN: &str = r"Member must satisfy regular expression pattern: (arn:(aws[a-zA-Z-]*)?:lambda:)?((eusc-)?[a-z]{2}((-gov)|(-iso([a-z]?)))?-[a-z]+-\d{1}:)?(\d{12}:)?(function:)?([a-zA-Z0-9-_]+)(:(\$LATEST|[a-zA-Z0-9-_]+))?";

/// The model's pattern of qualifiers.
const QUALIFIER_PATTERN: &str =
    r"Member must satisfy regular expression pattern: \$(LATEST(\.PUBLISHED)?)|[a-zA-Z0-9-_$]+";

/// The one qualifier of functions that are not looked for by version or alias.
const LATEST_PUBLISHED: &str = "$LATEST.PUBLISHED";

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
    /// What fits no pattern, all of it at once, or the two qualifiers differ.
    pub fn parse(text: &str, qualifier: Option<&str>) -> Result<Self, ApiError> {
        let found = tokens(text);
        let is_named = found.as_ref().is_some_and(|found| {
            is_looked_for(&found.name) && found.qualifier.as_deref().is_none_or(is_derived)
        });
        let mut violations = name_violations(text, TEXT_CHARS_MAX, is_named, PATTERN);
        // An empty parameter is what some clients send for none.
        let given = qualifier.filter(|qualifier| !qualifier.is_empty());
        if let Some(given) = given {
            let mut wrong = |constraint| violations.push(violation(given, "qualifier", constraint));
            if given.len() > QUALIFIER_CHARS_MAX {
                wrong("Member must have length less than or equal to 128");
            }
            if !is_qualifier(given) {
                wrong(QUALIFIER_PATTERN);
            }
        }
        let Some(mut found) = found.filter(|_| violations.is_empty()) else {
            return Err(ApiError::validation(&violations));
        };
        match (&found.qualifier, given) {
            (Some(derived), Some(given)) if derived != given => {
                return Err(ApiError::invalid_parameter(
                    "The derived qualifier from the function name does not match the specified qualifier.",
                ));
            }
            (None, Some(given)) => found.qualifier = Some(given.to_owned()),
            _ => {}
        }
        Ok(found)
    }

    /// Reads the `FunctionName` of a function that is to be made.
    ///
    /// # Errors
    /// It fits no pattern, or is too long.
    pub fn parse_new(text: &str) -> Result<Self, ApiError> {
        let found = tokens(text);
        let is_named = found.as_ref().is_some_and(|found| {
            is_name(&found.name)
                && (found.qualifier.as_deref())
                    .is_none_or(|qualifier| qualifier == "$LATEST" || is_name(qualifier))
        });
        let violations = name_violations(text, NEW_TEXT_CHARS_MAX, is_named, NEW_PATTERN);
        let Some(found) = found.filter(|_| violations.is_empty()) else {
            return Err(ApiError::validation(&violations));
        };
        if found.name.len() > NAME_CHARS_MAX {
            let constraint = "Member must have length less than or equal to 64";
            let violation = violation(&found.name, "functionName", constraint);
            // The model does not say so, the service does: another type of error.
            return Err(ApiError::invalid_parameter(
                ApiError::validation(&[violation]).message,
            ));
        }
        Ok(found)
    }

    /// Whether the qualifier can be an alias: a name, not a number.
    #[must_use]
    pub fn names_alias(&self) -> bool {
        let qualifier = self.qualifier.as_deref().unwrap_or_default();
        is_name(qualifier) && !qualifier.bytes().all(|byte| byte.is_ascii_digit())
    }
}

fn name_violations(text: &str, chars_max: usize, is_named: bool, pattern: &str) -> Vec<String> {
    let mut violations = Vec::new();
    let mut wrong = |constraint: &str| {
        violations.push(violation(text, "functionName", constraint));
    };
    if text.is_empty() {
        wrong("Member must have length greater than or equal to 1");
        return violations;
    }
    if text.len() > chars_max {
        wrong(&format!(
            "Member must have length less than or equal to {chars_max}"
        ));
    }
    if !is_named {
        wrong(pattern);
    }
    violations
}

fn tokens(text: &str) -> Option<FunctionRef> {
    let mut parts: Vec<&str> = text.split(':').collect();
    if parts.first() == Some(&"arn") {
        let [_, partition, "lambda", rest @ ..] = parts.as_slice() else {
            return None;
        };
        let partition_is_known = partition.is_empty() || partition.starts_with("aws");
        // The region and the account cannot be left out where there is a partition.
        if !partition_is_known || rest.len() < 3 || rest.iter().take(2).any(|part| part.is_empty())
        {
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
        [name, qualifier] => (*name, Some((*qualifier).to_owned())),
        _ => return None,
    };
    Some(FunctionRef {
        name: name.to_owned(),
        qualifier,
        region,
        account,
    })
}

/// Names with dots are no functions, but may be asked for.
fn is_looked_for(text: &str) -> bool {
    let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !text.is_empty() && text.bytes().all(is_fit)
}

/// A qualifier within a function's name.
fn is_derived(text: &str) -> bool {
    text == "$LATEST" || text == LATEST_PUBLISHED || is_name(text)
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

/// A qualifier of its own.
fn is_qualifier(text: &str) -> bool {
    let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || b"-_$".contains(&byte);
    text == LATEST_PUBLISHED || (!text.is_empty() && text.bytes().all(is_fit))
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
        let long = FunctionRef::parse(&"x".repeat(257), Some("a?")).unwrap_err();
        assert!(
            long.message.starts_with("2 validation errors detected: ")
                && long
                    .message
                    .contains("less than or equal to 256; Value 'a?' at 'qualifier'")
        );
        assert_eq!(FunctionRef::parse("a.b", None).unwrap().name, "a.b");
    }

    #[test]
    fn new_functions_have_stricter_names() {
        let arn = "arn:aws:lambda:us-east-1:000000000000:function:";
        assert_eq!(
            FunctionRef::parse_new(&format!("{arn}f")).unwrap().name,
            "f"
        );
        let long = FunctionRef::parse_new(&"x".repeat(65)).unwrap_err();
        assert_eq!(long.code, "InvalidParameterValueException");
        assert!(long.message.ends_with("less than or equal to 64"));
        for text in [
            "a.b",
            "f:a b",
            "f:$latest",
            &format!("{arn}{}", "x".repeat(140)),
        ] {
            let error = FunctionRef::parse_new(text).unwrap_err();
            assert_eq!(error.code, "ValidationException", "{text}");
        }
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
