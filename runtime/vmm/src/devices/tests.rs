//! Tests that drive the devices as a guest does.
