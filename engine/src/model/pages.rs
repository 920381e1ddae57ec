//! [`PageLayout`]: how the layers share the blocks of the KV cache.

use quire_kernels::KvLayer;

use super::ModelConfig;

/// More page groups than this would cost more in block tables than they save in memory.
const MOST_GROUPS: usize = 8;

/// The layers in page groups: the layers of a group have the same window and share block tables, and all groups have equally many places for
/// layers, so that one pool of blocks serves them all. (vLLM's hybrid KV-cache manager groups them so.)
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageLayout {
    /// Each group's window.
    pub windows: Vec<Option<u32>>,
    /// Places for layers in a group: the layers of a block.
    pub layers: usize,
    /// Where each of the model's layers is.
    pub places: Vec<KvLayer>,
}

impl PageLayout {
    /// For a model's layers.
    pub fn of(config: &ModelConfig) -> Self {
        let mut kinds: Vec<(Option<u32>, usize)> = Vec::new();
        for layer in &config.layers {
            match kinds.iter_mut().find(|kind| kind.0 == layer.window) {
                Some(kind) => kind.1 += 1,
                None => kinds.push((layer.window, 1)),
            }
        }
        // Full attention first: it is what prefixes are found by.
        kinds.sort_by_key(|kind| kind.0.is_some());
        let groups = |size: usize| {
            kinds
                .iter()
                .map(|kind| kind.1.div_ceil(size))
                .sum::<usize>()
        };
        let largest = kinds.iter().map(|kind| kind.1).max().unwrap_or(1);
        // The fewest empty places, and of those the fewest groups. One size always fits: the largest.
        let layers = (1..=largest)
            .filter(|&size| groups(size) <= MOST_GROUPS.max(kinds.len()))
            .min_by_key(|&size| (groups(size) * size, groups(size)))
            .unwrap_or(largest);
        let mut windows = Vec::new();
        let mut places = vec![KvLayer { group: 0, index: 0 }; config.layers.len()];
        for &(window, _) in &kinds {
            let of_kind = (0..config.layers.len()).filter(|&l| config.layers[l].window == window);
            for (at, layer) in of_kind.enumerate() {
                if at % layers == 0 {
                    windows.push(window);
                }
                places[layer] = KvLayer {
                    group: windows.len() - 1,
                    index: at % layers,
                };
            }
        }
        Self {
            windows,
            layers,
            places,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Checkpoint, ModelSource};
    use crate::model::LayerConfig;

    fn layout(windows: &[Option<u32>]) -> PageLayout {
        let demo = Checkpoint::open(&ModelSource::Demo).expect("it is part of the binary");
        let mut config = demo.config;
        config.layers = windows
            .iter()
            .map(|&window| LayerConfig {
                window,
                rope: Some(0),
                experts: false,
            })
            .collect();
        PageLayout::of(&config)
    }

    #[test]
    fn layers_that_are_all_alike_are_one_group() {
        for window in [None, Some(4096)] {
            let layout = layout(&[window; 28]);
            assert_eq!((layout.windows, layout.layers), (vec![window], 28));
            assert_eq!(
                layout.places[27],
                KvLayer {
                    group: 0,
                    index: 27
                }
            );
        }
    }

    #[test]
    fn alternating_layers_are_two_groups() {
        let windows: Vec<_> = (0..24).map(|l| (l % 2 == 0).then_some(128)).collect();
        let layout = layout(&windows);
        assert_eq!(layout.windows, [None, Some(128)]);
        assert_eq!(layout.layers, 12);
        assert_eq!(layout.places[0], KvLayer { group: 1, index: 0 });
        assert_eq!(layout.places[3], KvLayer { group: 0, index: 1 });
    }

    #[test]
    fn five_local_layers_to_a_global_one_waste_little() {
        // Gemma 3 1B: 26 layers, of which 5, 11, 17 and 23 see everything.
        let windows: Vec<_> = (0..26).map(|l| (l % 6 != 5).then_some(512)).collect();
        let layout = layout(&windows);
        assert_eq!(layout.layers, 4);
        assert_eq!(layout.windows.len(), 7);
        assert_eq!(layout.windows[0], None);
        let mut places = layout.places.clone();
        places.sort_by_key(|place| (place.group, place.index));
        places.dedup();
        assert_eq!(places.len(), 26, "no place twice");
    }
}
