//! What a process is to do to itself before anything else.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::Wall;

/// The orders are not what [`Orders::to_argument`] writes.
#[derive(Debug, Error)]
#[error("orders for the jail are malformed")]
pub struct OrdersError(#[source] serde_json::Error);

/// Which walls to raise, and with what. They come from the process's parent, in an argument.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Orders {
    /// All of these stand afterwards.
    pub walls: BTreeSet<Wall>,
    /// User and group for [`Wall::OwnUser`], as this host counts.
    pub user: u32,
    /// Folders of cgroups to join for [`Wall::Cgroup`]: one under cgroup v2, one a hierarchy under v1.
    pub cgroups: Vec<PathBuf>,
}

impl Orders {
    /// As one argument of a command line. It holds no secret: a process's arguments are readable by others.
    #[must_use]
    pub fn to_argument(&self) -> String {
        serde_json::to_string(self).expect("a list, a number and paths that came from text")
    }

    /// From such an argument.
    ///
    /// # Errors
    /// It is something else.
    pub fn from_argument(text: &str) -> Result<Self, OrdersError> {
        serde_json::from_str(text).map_err(OrdersError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_come_back_as_they_were_and_nothing_else_is_taken_for_them() {
        let orders = Orders {
            walls: BTreeSet::from(Wall::ALL),
            user: 1_879_048_192,
            cgroups: vec!["/sys/fs/cgroup/thaw-x/vm-0".into()],
        };
        assert_eq!(
            Orders::from_argument(&orders.to_argument()).ok(),
            Some(orders)
        );
        for wrong in ["", "{}", r#"{"walls":["moat"],"user":1,"cgroups":[]}"#] {
            assert!(Orders::from_argument(wrong).is_err(), "{wrong}");
        }
    }
}
