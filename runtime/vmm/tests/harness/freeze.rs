//! Saving, restoring, cloning.
