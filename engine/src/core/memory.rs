//! How large the KV cache is: from what was asked for, or from the memory that is left.

use quire_kernels::DeviceMemory;
use quire_scheduler::{PageGroup, blocks_needed, bytes_per_block};
use sysinfo::System;

use super::config::{EngineConfig, StartError};

/// Bytes a process may still use without swapping: the system's available memory, or its control group's if that is less.
/// 0 where the system does not tell.
pub fn available() -> u64 {
    let Ok(mut system) = System::new() else {
        return 0;
    };
    system.refresh_memory();
    let free = system.available_memory();
    match system.cgroup_limits() {
        // Of files that were read, a model's among them, pages are kept until something needs the memory.
        Some(group) => free.min((group.free_memory + cached_files()).min(group.total_memory)),
        None => free,
    }
}

/// Bytes of memory that a process may use at most; 0 where the system does not tell.
fn total() -> u64 {
    let Ok(mut system) = System::new() else {
        return 0;
    };
    system.refresh_memory();
    let all = system.total_memory();
    match system.cgroup_limits() {
        Some(group) if group.total_memory > 0 => all.min(group.total_memory),
        _ => all,
    }
}

/// Bytes of files that the control group's memory holds and can let go, by either version's statistics.
fn cached_files() -> u64 {
    let version_2 = std::fs::read_to_string("/sys/fs/cgroup/memory.stat");
    let statistics =
        version_2.or_else(|_| std::fs::read_to_string("/sys/fs/cgroup/memory/memory.stat"));
    cached_files_of(&statistics.unwrap_or_default())
}

fn cached_files_of(statistics: &str) -> u64 {
    let value = |name: &str| {
        let mut lines = statistics.lines();
        lines.find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok())
    };
    let both = |active: &str, inactive: &str| Some(value(active)? + value(inactive)?);
    // Version 1 tells the group's own share, and in `total_` that of all below it, to which the limit applies.
    both("total_active_file ", "total_inactive_file ")
        .or_else(|| both("active_file ", "inactive_file "))
        .unwrap_or(0)
}

/// The memory that a KV cache can take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    /// Bytes that it takes unless told otherwise.
    pub spare: u64,
    /// More than so many bytes there never are; 0 where nobody tells.
    pub total: u64,
}

impl Room {
    /// Of the device that has least to spare (every rank has as many blocks as the first, and none larger), or of the host's memory where devices have none
    /// of their own.
    pub fn of(memories: &[DeviceMemory], utilization: f64) -> Self {
        let spare = memories.iter().map(|&of| spare_of_device(of, utilization));
        match (spare.min(), memories.iter().map(|of| of.total).min()) {
            (Some(spare), Some(total)) => Self { spare, total },
            _ => Self {
                spare: available() / 2,
                total: total(),
            },
        }
    }
}

/// Bytes of a device that are still to be had, of the share `utilization` of its memory that all may take together.
fn spare_of_device(memory: DeviceMemory, utilization: f64) -> u64 {
    let kept = (memory.total as f64 * (1.0 - utilization)).ceil() as u64;
    memory.free.saturating_sub(kept)
}

/// Refuses weights of so many bytes that are too large for a device, before they are loaded.
///
/// # Errors
/// They are; see [`StartError::ModelTooLarge`].
pub(super) fn check_weights(
    weights: u64,
    memory: DeviceMemory,
    utilization: f64,
) -> Result<(), StartError> {
    let allowed = spare_of_device(memory, utilization);
    if weights <= allowed {
        return Ok(());
    }
    Err(StartError::ModelTooLarge {
        weights,
        free: memory.free,
        total: memory.total,
        utilization,
        allowed,
    })
}

/// Refuses weights of so many bytes that the host's memory cannot hold, before they are loaded: the system would end the process in the middle of it.
///
/// # Errors
/// They are too large; see [`StartError::ModelTooLargeForHost`].
pub(super) fn check_weights_of_host(weights: u64, available: u64) -> Result<(), StartError> {
    // 0: nobody tells.
    if available > 0 && weights > available {
        return Err(StartError::ModelTooLargeForHost { weights, available });
    }
    Ok(())
}

/// The sizes an engine runs with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    /// Blocks of the KV cache, of all page groups together.
    pub blocks: u32,
    /// Longest prompt plus generation, in tokens.
    pub max_model_len: u32,
}

/// Chooses the sizes. `groups`: the model's page groups; `block_bytes`: bytes of one block, which holds the layers of one group;
/// `max_position`: the checkpoint's longest context.
///
/// # Errors
/// A context longer than the checkpoint allows, a cache that cannot hold one, or one that no memory can hold.
pub(super) fn sizes(
    config: &EngineConfig,
    groups: &[PageGroup],
    max_position: usize,
    block_bytes: usize,
    room: Room,
) -> Result<Sizes, StartError> {
    let max_position = u32::try_from(max_position).unwrap_or(u32::MAX);
    if let Some(asked) = config.max_model_len
        && (asked == 0 || asked > max_position)
    {
        return Err(StartError::Setting {
            name: "--max-model-len",
            value: asked.to_string(),
            expected: format!("1 to {max_position}, the context the checkpoint was made for"),
        });
    }
    let wanted = config.max_model_len.unwrap_or(max_position);
    if let Some(asked) = config.kv_cache_memory
        && room.total > 0
        && asked > room.total
    {
        return Err(StartError::Setting {
            name: "--kv-cache-memory",
            value: format!("{asked} bytes"),
            expected: format!("at most {} bytes, all memory there is", room.total),
        });
    }
    let bytes = config.kv_cache_memory.unwrap_or(room.spare);
    let fitting = match config.kv_cache_memory {
        Some(asked) => asked / block_bytes as u64,
        // What the scheduler knows of a block can be more than the block itself.
        None => bytes / (block_bytes + bytes_per_block(config.block_size, groups)) as u64,
    };
    // By the rule the scheduler refuses requests by.
    let needed = |tokens| {
        let chunk = config.max_batch_tokens;
        blocks_needed(groups, config.block_size, chunk, tokens, 1)
    };
    // More blocks than every running sequence at full length could hold would never be touched.
    let useful = needed(wanted).saturating_mul(u64::from(config.max_seqs));
    let blocks = match config.kv_cache_memory {
        Some(_) => fitting,
        None => fitting.min(useful),
    };
    let blocks = u32::try_from(blocks).unwrap_or(u32::MAX - 1);
    let tokens = longest(wanted, |tokens| needed(tokens) <= u64::from(blocks));
    let max_model_len = match config.max_model_len {
        None if tokens > 0 => tokens,
        _ if tokens == wanted => wanted,
        _ => {
            return Err(StartError::CacheTooSmall {
                bytes,
                tokens: u64::from(tokens),
                max_model_len: wanted,
                needed_bytes: needed(wanted) * block_bytes as u64,
            });
        }
    };
    Ok(Sizes {
        blocks,
        max_model_len,
    })
}

/// The longest context up to `most` that fits, given that a shorter one fits where a longer one does; 0 if none does.
fn longest(most: u32, fits: impl Fn(u32) -> bool) -> u32 {
    let (mut fitting, mut too_long) = (0, u64::from(most) + 1);
    while too_long - u64::from(fitting) > 1 {
        // Between two numbers of 32 bits.
        let middle = u64::from(fitting).midpoint(too_long) as u32;
        if fits(middle) {
            fitting = middle;
        } else {
            too_long = u64::from(middle);
        }
    }
    fitting
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &[PageGroup] = &[PageGroup::FULL];

    fn room(spare: u64) -> Room {
        Room { spare, total: 0 }
    }

    fn config(max_model_len: Option<u32>, kv_cache_memory: Option<u64>) -> EngineConfig {
        EngineConfig {
            max_model_len,
            kv_cache_memory,
            max_seqs: 4,
            ..EngineConfig::default()
        }
    }

    #[test]
    fn by_default_the_cache_takes_what_is_to_spare() {
        let each = 1000 + bytes_per_block(16, FULL) as u64;
        let sizes = sizes(&config(None, None), FULL, 2048, 1000, room(100 * each)).unwrap();
        assert_eq!(sizes.blocks, 100);
        assert_eq!(
            sizes.max_model_len, 1600,
            "the context shrinks to the cache"
        );
    }

    #[test]
    fn by_default_the_cache_is_no_larger_than_all_sequences_need() {
        let sizes = sizes(&config(None, None), FULL, 2048, 1000, room(1 << 40)).unwrap();
        assert_eq!(sizes.blocks, 4 * 128);
        assert_eq!(sizes.max_model_len, 2048);
    }

    #[test]
    fn memory_that_was_asked_for_is_taken_whole() {
        let sizes = sizes(&config(None, Some(1_000_000)), FULL, 2048, 1000, room(0)).unwrap();
        assert_eq!(sizes.blocks, 1000);
    }

    #[test]
    fn a_context_that_does_not_fit_the_cache_is_refused_with_the_numbers() {
        let error = sizes(
            &config(Some(2048), Some(100_000)),
            FULL,
            2048,
            1000,
            room(0),
        )
        .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("1600 tokens"), "{text}");
        assert!(text.contains("128000 bytes"), "{text}");
    }

    #[test]
    fn a_context_longer_than_the_checkpoint_was_made_for_is_refused() {
        let error = sizes(&config(Some(4096), None), FULL, 2048, 1000, room(1 << 30)).unwrap_err();
        assert!(error.to_string().contains("1 to 2048"), "{error}");
    }

    #[test]
    fn no_memory_at_all_is_an_error_not_an_empty_cache() {
        assert!(sizes(&config(None, Some(10)), FULL, 2048, 1000, room(0)).is_err());
    }

    #[test]
    fn a_group_with_a_window_takes_its_window_and_a_step_not_the_context() {
        let window = PageGroup { window: Some(256) };
        let groups = [PageGroup::FULL, window];
        let config = EngineConfig {
            max_seqs: 1,
            max_batch_tokens: 512,
            ..config(None, None)
        };
        let all = sizes(&config, &groups, 1 << 16, 1000, room(1 << 40)).unwrap();
        assert_eq!(all.max_model_len, 1 << 16);
        assert_eq!(all.blocks, 4096 + 16 + 32 + 1);
        let each = 1000 + bytes_per_block(16, &groups) as u64;
        let half = sizes(&config, &groups, 1 << 16, 1000, room(2097 * each)).unwrap();
        assert_eq!(half.blocks, 2097);
        assert_eq!(half.max_model_len, (2097 - 49) * 16);
        let each = 1000 + bytes_per_block(16, &[window]) as u64;
        let windowed = sizes(&config, &[window], 1 << 16, 1000, room(50 * each)).unwrap();
        assert_eq!(windowed.max_model_len, 1 << 16, "it runs in a fixed space");
    }

    #[test]
    fn a_share_of_a_gpu_counts_what_others_and_the_weights_take() {
        let memory = |free| DeviceMemory { free, total: 1000 };
        assert_eq!(spare_of_device(memory(1000), 0.9), 900);
        assert_eq!(spare_of_device(memory(600), 0.9), 500);
        assert_eq!(spare_of_device(memory(50), 0.9), 0);
        assert_eq!(spare_of_device(memory(50), 1.0), 50);
    }

    #[test]
    fn of_several_gpus_the_fullest_decides() {
        let memory = |free| DeviceMemory { free, total: 1000 };
        let spare = |memories: &[DeviceMemory]| Room::of(memories, 0.9).spare;
        assert_eq!(spare(&[memory(900), memory(300), memory(800)]), 200);
        assert_eq!(spare(&[memory(900)]), 800);
    }

    #[test]
    fn a_cache_larger_than_all_memory_is_refused_with_the_number() {
        let room = Room {
            spare: 0,
            total: 1 << 30,
        };
        let asked = |bytes| sizes(&config(None, Some(bytes)), FULL, 2048, 1000, room);
        assert!(asked(1 << 30).is_ok());
        let text = asked((1 << 30) + 1).unwrap_err().to_string();
        assert!(
            text.contains("--kv-cache-memory") && text.contains("1073741824"),
            "{text}"
        );
        assert!(total() == 0 || total() >= available());
    }

    #[test]
    fn weights_that_the_host_cannot_hold_are_refused_with_the_numbers() {
        assert!(check_weights_of_host(700, 700).is_ok());
        assert!(check_weights_of_host(700, 0).is_ok(), "nobody tells");
        let text = check_weights_of_host(701, 700).unwrap_err().to_string();
        assert!(text.contains("701") && text.contains("700"), "{text}");
    }

    #[test]
    fn files_that_were_read_are_memory_to_be_had() {
        let version_2 = "anon 5\nfile 40\ninactive_anon 1\ninactive_file 30\nactive_file 7\n";
        assert_eq!(cached_files_of(version_2), 37);
        let version_1 = "cache 9\nactive_file 1\ninactive_file 2\ntotal_active_file 10\ntotal_inactive_file 20\n";
        assert_eq!(cached_files_of(version_1), 30);
        assert_eq!(cached_files_of(""), 0);
    }

    #[test]
    fn weights_that_do_not_fit_a_gpu_are_refused_with_the_numbers() {
        let memory = DeviceMemory {
            free: 800,
            total: 1000,
        };
        assert!(check_weights(700, memory, 0.9).is_ok());
        let text = check_weights(701, memory, 0.9).unwrap_err().to_string();
        for number in ["701 bytes", "800 of 1000", "0.9", "allows 700"] {
            assert!(text.contains(number), "{text}");
        }
    }
}
