//! Text in, text out over an [`crate::core::Engine`]: what every frontend shares. Owned by the frontends' author.
