//! The frontends: thin translations between protocols and [`crate::generation`]. Owned by the frontends' author.
