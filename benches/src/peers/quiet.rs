//! Whether the machine is quiet, which a comparison needs: llama.cpp's threads wait for each other by spinning, and lose far more than ours to whoever else wants the cores.

use sysinfo::System;

/// A load above this, of the last minute, is somebody else's.
const QUIET: f64 = 0.5;

/// Processes that wanted to run in the last minute, in the mean; `None`: the system does not tell. To be asked before anything is measured.
pub fn load() -> Option<f64> {
    System::load_average().ok().map(|load| load.one)
}

/// What to tell who measures on a machine with such a load.
pub fn warning(load: Option<f64>) -> Option<String> {
    let load = load.filter(|load| *load > QUIET)?;
    Some(format!(
        "the machine is busy: {load:.1} processes wanted to run in the last minute. Ratios of such a run flatter us: llama.cpp's threads spin, and lose more than ours to others"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_machine_is_said_to_be_one() {
        assert_eq!(warning(Some(0.2)), None);
        assert_eq!(warning(None), None);
        assert!(warning(Some(7.25)).unwrap().contains("7.2 processes"));
    }
}
