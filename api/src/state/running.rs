//! How many invocations of a function run, and whether its reserved concurrency lets another one in.
//!
//! As on AWS what is provisioned for a version is taken out of what is reserved for the function: no other version gets it, and
//! the version itself goes beyond it only into what nothing is provisioned from. (AWS Lambda Developer Guide, "Understanding
//! reserved concurrency and provisioned concurrency".)

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::record::{Function, VersionId};

type Counts = BTreeMap<VersionId, u32>;

/// Invocations of a function that run or wait, by version.
#[derive(Clone, Debug, Default)]
pub struct Entrance(Arc<Mutex<Counts>>);

/// An invocation that is counted until this is dropped.
#[derive(Debug)]
pub struct Running {
    entrance: Entrance,
    id: VersionId,
}

impl Entrance {
    /// Counts an invocation of a version; `None` when as many run as are reserved.
    #[must_use]
    pub fn enter(&self, function: &Function, id: VersionId) -> Option<Running> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !admits(function, &counts, id) {
            return None;
        }
        *counts.entry(id).or_default() += 1;
        Some(Running {
            entrance: self.clone(),
            id,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut counts = (self.entrance.0.lock()).unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.id);
            }
        }
    }
}

fn admits(function: &Function, counts: &Counts, id: VersionId) -> bool {
    let Some(reserved) = function.reserved_concurrency else {
        return true;
    };
    let own = counts.get(&id).copied().unwrap_or_default();
    if reserved > 0 && own < function.provisioned_for(id) {
        return true;
    }
    let beyond = |(id, count): (&VersionId, &u32)| {
        u64::from(count.saturating_sub(function.provisioned_for(*id)))
    };
    let shared: u64 = counts.iter().map(beyond).sum();
    shared + function.provisioned_except("") < u64::from(reserved)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Provisioned;
    use crate::testing::function;

    const V1: VersionId = VersionId::Number(1);

    fn reserved(count: u32, provisioned: u32) -> Function {
        let mut function = function("f");
        function.reserved_concurrency = Some(count);
        if provisioned > 0 {
            let config = Provisioned {
                requested: provisioned,
                modified_unix_ms: 0,
            };
            function.provisioned.insert("1".to_owned(), config);
        }
        function
    }

    #[test]
    fn all_versions_share_what_is_reserved() {
        let (function, entrance) = (reserved(2, 0), Entrance::default());
        let first = entrance.enter(&function, V1).unwrap();
        let _second = entrance.enter(&function, VersionId::Latest).unwrap();
        assert!(entrance.enter(&function, V1).is_none());
        drop(first);
        assert!(entrance.enter(&function, VersionId::Latest).is_some());
        assert!(Entrance::default().enter(&reserved(0, 0), V1).is_none());
    }

    #[test]
    fn what_is_provisioned_for_a_version_is_no_other_ones() {
        let (function, entrance) = (reserved(1, 1), Entrance::default());
        assert!(entrance.enter(&function, VersionId::Latest).is_none());
        let _own = entrance.enter(&function, V1).unwrap();
        assert!(entrance.enter(&function, V1).is_none());

        let (function, entrance) = (reserved(2, 1), Entrance::default());
        let _own = entrance.enter(&function, V1).unwrap();
        let beyond = entrance.enter(&function, V1).unwrap();
        assert!(entrance.enter(&function, VersionId::Latest).is_none());
        drop(beyond);
        let _latest = entrance.enter(&function, VersionId::Latest).unwrap();
        assert!(entrance.enter(&function, V1).is_none());
    }
}
