//! Resource-based policies, of functions and of layer versions: kept, and written as IAM writes them. Nobody is asked for them:
//! who may do what here, keys say.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

/// Longest policy, bytes.
const BYTES_MAX: usize = 20_480;

/// A resource-based policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Changes with every change of it; a function's policy has the revision of what it is of instead.
    pub revision_id: String,
    /// In the order in which they were added; without any there is no policy.
    pub statements: Vec<Statement>,
}

/// Who may do what, as IAM writes it down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Statement {
    /// Its name within the policy.
    pub sid: String,
    /// `Allow`.
    pub effect: String,
    /// `"*"`, or an object.
    pub principal: serde_json::Value,
    /// `lambda:InvokeFunction`, …
    pub action: String,
    /// The ARN, with its qualifier if it has one.
    pub resource: String,
    /// By operator and key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub condition: Option<serde_json::Value>,
}

/// Why a policy stays as it is. The texts are those that Lambda's clients know.
#[derive(Debug, Error)]
pub enum PolicyError {
    /// The client's revision is not the policy's; by which operation it learns that.
    #[error(
        "The Revision Id provided does not match the latest Revision Id. Call the {0} API to retrieve the latest Revision Id"
    )]
    OtherRevision(&'static str),
    /// There is a statement of this name.
    #[error(
        "The statement id ({0}) provided already exists. Please provide a new statement id, or remove the existing statement."
    )]
    Exists(String),
    /// There is none.
    #[error("Statement {0} is not found in resource policy.")]
    NoStatement(String),
    /// There is no policy.
    #[error("No policy is associated with the given resource.")]
    None,
    /// It would be longer than it may be; bytes.
    #[error("The final policy size ({0}) is bigger than the limit ({BYTES_MAX}).")]
    TooLong(usize),
    /// It cannot be written.
    #[error("the policy is no JSON")]
    Json(#[from] serde_json::Error),
}

impl Policy {
    /// Adds a statement.
    ///
    /// # Errors
    /// See [`PolicyError`]; the policy is as it was.
    pub fn add(&mut self, statement: Statement) -> Result<(), PolicyError> {
        if self.statements.iter().any(|one| one.sid == statement.sid) {
            return Err(PolicyError::Exists(statement.sid));
        }
        self.statements.push(statement);
        let length = self.document()?.len();
        if length > BYTES_MAX {
            self.statements.pop();
            return Err(PolicyError::TooLong(length));
        }
        self.revision_id = Uuid::new_v4().to_string();
        Ok(())
    }

    /// Removes a statement.
    ///
    /// # Errors
    /// See [`PolicyError`]; the policy is as it was.
    pub fn remove(&mut self, sid: &str) -> Result<(), PolicyError> {
        if self.statements.is_empty() {
            return Err(PolicyError::None);
        }
        let place = self.statements.iter().position(|one| one.sid == sid);
        let place = place.ok_or_else(|| PolicyError::NoStatement(sid.to_owned()))?;
        self.statements.remove(place);
        self.revision_id = Uuid::new_v4().to_string();
        Ok(())
    }

    /// The policy as IAM writes it.
    ///
    /// # Errors
    /// It is no JSON.
    pub fn document(&self) -> Result<String, PolicyError> {
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Document<'a> {
            version: &'a str,
            id: &'a str,
            statement: &'a [Statement],
        }
        Ok(serde_json::to_string(&Document {
            version: "2012-10-17",
            id: "default",
            statement: &self.statements,
        })?)
    }

    /// Whether the policy is at the revision that a client wants; none wants any.
    ///
    /// # Errors
    /// It is at another.
    pub fn check(&self, wanted: Option<&str>, operation: &'static str) -> Result<(), PolicyError> {
        match wanted.filter(|wanted| !wanted.is_empty()) {
            Some(wanted) if wanted != self.revision_id => {
                Err(PolicyError::OtherRevision(operation))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_that_grows_too_long_is_as_it_was() {
        let mut policy = Policy::default();
        let one = |number: usize| Statement {
            sid: format!("{number:0100}"),
            effect: "Allow".to_owned(),
            principal: "*".into(),
            action: "lambda:InvokeFunction".to_owned(),
            resource: "r".repeat(400),
            condition: None,
        };
        let refused = (0..100).find_map(|number| policy.add(one(number)).err());
        assert!(matches!(refused, Some(PolicyError::TooLong(_))));
        assert!(policy.document().unwrap().len() <= BYTES_MAX);
        let stale = policy.check(Some("x"), "GetPolicy");
        assert!(matches!(
            stale,
            Err(PolicyError::OtherRevision("GetPolicy"))
        ));
        policy.remove(&one(0).sid).unwrap();
        let gone = policy.remove(&one(0).sid);
        assert!(matches!(gone, Err(PolicyError::NoStatement(_))));
    }
}
