//! [`Registry`]: live requests by the id their client gave them, so that they can be aborted from another connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::core::AbortHandle;

/// Live requests by id; clones refer to the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Registry {
    live: Arc<Mutex<HashMap<Arc<str>, Entry>>>,
}

#[derive(Debug)]
enum Entry {
    /// On its way to the engine.
    Arriving {
        aborted: bool,
    },
    Live(AbortHandle),
}

/// A request's place in the registry; dropping it takes the request out.
#[derive(Debug)]
pub(super) struct Registered {
    registry: Registry,
    id: Arc<str>,
}

impl Registry {
    /// Takes an id for a request that is about to be submitted; `None` if a live request has it.
    pub fn enter(&self, id: &Arc<str>) -> Option<Registered> {
        let mut live = self.lock();
        if live.contains_key(id) {
            return None;
        }
        live.insert(Arc::clone(id), Entry::Arriving { aborted: false });
        Some(Registered {
            registry: self.clone(),
            id: Arc::clone(id),
        })
    }

    /// Aborts a request; false if none of that id is live.
    pub fn abort(&self, id: &str) -> bool {
        match self.lock().get_mut(id) {
            None => false,
            Some(Entry::Arriving { aborted }) => {
                *aborted = true;
                true
            }
            Some(Entry::Live(handle)) => {
                handle.abort();
                true
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Entry>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registered {
    /// The request was submitted; carries out an abort that came before.
    pub fn submitted(&self, handle: AbortHandle) {
        let mut live = self.registry.lock();
        if let Some(Entry::Arriving { aborted: true }) = live.get(&self.id) {
            handle.abort();
        }
        live.insert(Arc::clone(&self.id), Entry::Live(handle));
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.registry.lock().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_taken_while_its_request_lives() {
        let registry = Registry::default();
        let id: Arc<str> = "a".into();
        let place = registry.enter(&id).expect("free");
        assert!(registry.enter(&id).is_none());
        assert!(registry.abort("a"));
        drop(place);
        assert!(!registry.abort("a"));
        assert!(registry.enter(&id).is_some());
    }
}
