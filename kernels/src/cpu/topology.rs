//! [`Topology`]: the NUMA nodes, cores and hardware threads this process may use; and staying on them.
//!
//! What the system tells (`/sys/devices/system`, the thread's affinity) goes in, nodes with their CPUs come out. A CPU is a hardware thread: of each
//! node the first one of every core comes first, so that as many threads as there are cores get a core each. Where the system tells nothing, there is
//! one node, and nothing is pinned.

use std::path::Path;

/// The nodes that have CPUs which this process may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Topology {
    nodes: Vec<Node>,
}

/// CPUs with a memory of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    /// First hardware threads of its cores, then second ones, and so on; never empty but for a system that tells nothing.
    cpus: Vec<usize>,
    /// How many first ones there are.
    cores: usize,
}

/// Where the threads of a pool are to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placement {
    /// One for each node that has threads; never empty.
    pub teams: Vec<Team>,
}

/// The threads of one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Team {
    /// How many there are; at least one.
    pub threads: usize,
    /// The CPU of each; empty: they may be on any of the node.
    pub cpus: Vec<usize>,
    /// All CPUs of the node; empty: they may be anywhere.
    pub node: Vec<usize>,
}

impl Topology {
    /// This machine, as far as this process may use it.
    pub fn of_machine() -> Self {
        Self::read(Path::new("/sys/devices/system"), &allowed_cpus())
    }

    /// As the files below `system` tell it, of the CPUs `allowed`.
    fn read(system: &Path, allowed: &[usize]) -> Self {
        let list = |path: String| {
            let text = std::fs::read_to_string(system.join(path)).ok()?;
            parse_cpu_list(&text)
        };
        // How many hardware threads of its core that may be used come before a CPU.
        let nth = |cpu: usize| {
            let siblings = list(format!("cpu/cpu{cpu}/topology/thread_siblings_list"));
            let siblings = siblings.unwrap_or_default();
            let before = siblings.iter().filter(|s| **s < cpu && allowed.contains(s));
            before.count()
        };
        let node = |cpus: Vec<(usize, usize)>| Node {
            cores: cpus.iter().filter(|(nth, _)| *nth == 0).count(),
            cpus: cpus.into_iter().map(|(_, cpu)| cpu).collect(),
        };
        let mut left: Vec<_> = allowed.iter().map(|&cpu| (nth(cpu), cpu)).collect();
        left.sort_unstable();
        let mut nodes = Vec::new();
        for online in list("node/online".to_owned()).unwrap_or_default() {
            let of_node = list(format!("node/node{online}/cpulist")).unwrap_or_default();
            let (cpus, others) = left.iter().partition(|(_, cpu)| of_node.contains(cpu));
            left = others;
            nodes.push(node(cpus));
        }
        // What no node claims (a kernel without NUMA claims nothing) is a node by itself.
        nodes.push(node(left));
        nodes.retain(|node| !node.cpus.is_empty());
        if nodes.is_empty() {
            nodes.push(node(Vec::new()));
        }
        Self { nodes }
    }

    /// The same CPUs as one node.
    pub fn as_one(&self) -> Self {
        let (mut firsts, mut others) = (Vec::new(), Vec::new());
        for node in &self.nodes {
            firsts.extend_from_slice(&node.cpus[..node.cores]);
            others.extend_from_slice(&node.cpus[node.cores..]);
        }
        let cores = firsts.len();
        firsts.append(&mut others);
        Self {
            nodes: vec![Node {
                cpus: firsts,
                cores,
            }],
        }
    }

    /// The same CPUs as `nodes` nodes, for experiments and tests. Nodes share CPUs where there are fewer of those.
    pub fn emulated(&self, nodes: usize) -> Self {
        let mut cpus = self.as_one().nodes.remove(0).cpus;
        let there = cpus.len();
        if (1..nodes).contains(&there) {
            cpus = cpus.into_iter().cycle().take(nodes).collect();
        }
        let nodes = (0..nodes).map(|node| {
            let begin = |node| proportion(cpus.len(), node, nodes);
            let cpus = &cpus[begin(node)..begin(node + 1)];
            Node {
                cpus: cpus.to_vec(),
                cores: cpus.len(),
            }
        });
        Self {
            nodes: nodes.collect(),
        }
    }

    /// Spreads `threads` threads over the nodes in proportion to their CPUs; nodes that get none are left out.
    ///
    /// `pin`: threads stay on their node if it has a CPU for each, and on a CPU of their own if they are as many as its cores or its CPUs. With fewer,
    /// which CPUs are free is for the system to know: other processes are there too, and would choose the same first ones.
    pub fn place(&self, threads: usize, pin: bool) -> Placement {
        let mut counts = vec![0; self.nodes.len()];
        for _ in 0..threads.max(1) {
            // Whoever has the most CPUs for each thread it would have; of equal ones the first.
            let fullness = |&node: &usize| {
                let cpus = self.nodes[node].cpus.len().max(1);
                ((counts[node] + 1) * 1_000_000 / cpus, node)
            };
            let node = (0..counts.len()).min_by_key(fullness).unwrap_or(0);
            counts[node] += 1;
        }
        let mut distinct: Vec<usize> = self.nodes.iter().flat_map(|n| n.cpus.clone()).collect();
        distinct.sort_unstable();
        distinct.dedup();
        let shared = distinct.len() < self.nodes.iter().map(|n| n.cpus.len()).sum();
        let mut fits = counts.iter().zip(&self.nodes);
        let pin = pin && !shared && fits.all(|(&count, node)| count <= node.cpus.len());
        let teams = counts.iter().zip(&self.nodes);
        let teams = teams.filter(|team| *team.0 > 0).map(|(&threads, node)| {
            let full = threads == node.cores || threads == node.cpus.len();
            let node = if pin { node.cpus.clone() } else { Vec::new() };
            let own = if full { threads } else { 0 };
            Team {
                threads,
                cpus: node.iter().copied().take(own).collect(),
                node,
            }
        });
        Placement {
            teams: teams.collect(),
        }
    }
}

/// Where the share of the part `nth` of `of` equal parts begins, of `items` items in order. The first parts get what does not divide.
pub(crate) fn proportion(items: usize, nth: usize, of: usize) -> usize {
    (items * nth).div_ceil(of)
}

/// Reads the kernel's notation for CPUs and nodes: `0-3,8,10-11`.
fn parse_cpu_list(text: &str) -> Option<Vec<usize>> {
    /// More than any kernel has.
    const MOST: usize = 1 << 16;
    let mut cpus = Vec::new();
    for range in text.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if last >= MOST {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// The CPUs this process may use, in order; empty where the system does not say.
#[cfg(target_os = "linux")]
fn allowed_cpus() -> Vec<usize> {
    affinity().map_or_else(Vec::new, |set| {
        (0..libc::CPU_SETSIZE as usize)
            // SAFETY: the index is below CPU_SETSIZE.
            .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
            .collect()
    })
}

/// The CPUs that the calling thread may run on.
#[cfg(target_os = "linux")]
fn affinity() -> Option<libc::cpu_set_t> {
    // SAFETY: an all-zero set is a valid, empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer and the size belong to `set`.
    let got = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) };
    (got == 0).then_some(set)
}

/// Keeps the calling thread on some CPUs. Without effect where that is not allowed: it is a matter of speed only.
#[cfg(target_os = "linux")]
pub(crate) fn pin(cpus: &[usize]) {
    // SAFETY: an all-zero set is a valid, empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus {
        if cpu < libc::CPU_SETSIZE as usize {
            // SAFETY: the index is below CPU_SETSIZE.
            unsafe { libc::CPU_SET(cpu, &mut set) };
        }
    }
    // SAFETY: pointer and size belong to `set`. (The kernel refuses an empty one.)
    unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) };
}

/// The calling thread is kept on some CPUs until this is dropped.
#[cfg(target_os = "linux")]
pub(crate) struct Visit(Option<libc::cpu_set_t>);

#[cfg(target_os = "linux")]
impl Visit {
    /// Nowhere else but on `cpus`; anywhere, if there are none.
    pub fn to(cpus: &[usize]) -> Self {
        let before = if cpus.is_empty() { None } else { affinity() };
        if before.is_some() {
            pin(cpus);
        }
        Self(before)
    }
}

#[cfg(target_os = "linux")]
impl Drop for Visit {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // SAFETY: pointer and size belong to the set.
            unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), before) };
        }
    }
}

/// The CPUs this process may use, in order; empty where the system does not say.
#[cfg(not(target_os = "linux"))]
fn allowed_cpus() -> Vec<usize> {
    Vec::new()
}

/// Keeps the calling thread on some CPUs, where the system can.
#[cfg(not(target_os = "linux"))]
pub(crate) fn pin(_cpus: &[usize]) {}

/// The calling thread is kept on some CPUs until this is dropped, where the system can.
#[cfg(not(target_os = "linux"))]
pub(crate) struct Visit;

#[cfg(not(target_os = "linux"))]
impl Visit {
    /// Nowhere else but on `cpus`.
    pub fn to(_cpus: &[usize]) -> Self {
        Self
    }
}

/// Threads that compute by default: the CPUs this process may use, within the CPU quota of its container.
pub(crate) fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    /// Files as the kernel has them, in a directory that goes away with it.
    struct System(PathBuf);

    impl System {
        /// `nodes`: the CPUs of each; `cores`: the hardware threads of each.
        fn new(name: &str, nodes: &[(usize, &str)], cores: &[&str]) -> Self {
            let directory = format!("quire-topology-{name}-{}", std::process::id());
            let system = Self(std::env::temp_dir().join(directory));
            let online: Vec<String> = nodes.iter().map(|node| node.0.to_string()).collect();
            system.write("node/online", &online.join(","));
            for (node, cpus) in nodes {
                system.write(&format!("node/node{node}/cpulist"), cpus);
            }
            for core in cores {
                for cpu in parse_cpu_list(core).unwrap_or_default() {
                    system.write(&format!("cpu/cpu{cpu}/topology/thread_siblings_list"), core);
                }
            }
            system
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.join(path);
            fs::create_dir_all(path.parent().expect("it is below the directory"))
                .and_then(|()| fs::write(path, format!("{text}\n")))
                .expect("the temporary directory can be written");
        }

        fn topology(&self, allowed: &[usize]) -> Vec<Vec<usize>> {
            let topology = Topology::read(&self.0, allowed);
            topology.nodes.into_iter().map(|node| node.cpus).collect()
        }
    }

    impl Drop for System {
        fn drop(&mut self) {
            // It is in the way of nobody if it stays.
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn counts(placement: &Placement) -> Vec<usize> {
        placement.teams.iter().map(|team| team.threads).collect()
    }

    #[test]
    fn the_kernels_lists_of_cpus_are_read() {
        assert_eq!(
            parse_cpu_list("0-3,8,10-11\n"),
            Some(vec![0, 1, 2, 3, 8, 10, 11])
        );
        assert_eq!(parse_cpu_list("\n"), Some(vec![]));
        assert_eq!(parse_cpu_list("all"), None);
        assert_eq!(parse_cpu_list("0-99999999999"), None);
    }

    #[test]
    fn two_sockets_are_two_nodes_whose_cores_come_before_their_second_threads() {
        let cores = ["0,8", "1,9", "2,10", "3,11", "4,12", "5,13", "6,14", "7,15"];
        let system = System::new("sockets", &[(0, "0-3,8-11"), (1, "4-7,12-15")], &cores);
        let all: Vec<usize> = (0..16).collect();
        assert_eq!(
            system.topology(&all),
            [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]
        );
    }

    #[test]
    fn neighbouring_numbers_may_be_threads_of_one_core() {
        let system = System::new("neighbours", &[(0, "0-3")], &["0-1", "2-3"]);
        assert_eq!(system.topology(&[0, 1, 2, 3]), [[0, 2, 1, 3]]);
    }

    #[test]
    fn only_nodes_with_cpus_that_may_be_used_count() {
        // Node 2 has memory and no CPUs, as some accelerators do.
        let nodes = [(0, "0-3"), (1, "4-7"), (2, "")];
        let system = System::new("affinity", &nodes, &[]);
        assert_eq!(system.topology(&[5, 6]), [[5, 6]]);
        assert_eq!(system.topology(&[3, 4]), [[3], [4]]);
        let system = System::new("second-threads", &[(0, "0-3")], &["0,2", "1,3"]);
        let seconds = Topology::read(&system.0, &[2, 3]);
        assert_eq!(seconds.nodes, [node(2..4)], "nobody is on their cores");
    }

    #[test]
    fn a_system_that_tells_nothing_is_one_node() {
        let nowhere = Path::new("/nonexistent");
        assert_eq!(Topology::read(nowhere, &[2, 3]).nodes, [node(2..4)]);
        let topology = Topology::read(nowhere, &[]);
        assert_eq!(topology.nodes.len(), 1);
        assert_eq!(counts(&topology.place(4, true)), [4]);
        assert_eq!(counts(&topology.emulated(3).place(4, true)), [2, 1, 1]);
    }

    /// Cores of one hardware thread each.
    fn node(cpus: std::ops::Range<usize>) -> Node {
        Node {
            cores: cpus.len(),
            cpus: cpus.collect(),
        }
    }

    #[test]
    fn threads_are_spread_in_proportion_to_cpus() {
        let topology = Topology {
            nodes: vec![node(0..8), node(8..12)],
        };
        assert_eq!(counts(&topology.place(12, true)), [8, 4]);
        assert_eq!(counts(&topology.place(6, true)), [4, 2]);
        assert_eq!(counts(&topology.place(3, true)), [2, 1]);
        assert_eq!(counts(&topology.place(1, true)), [1]);
        let crowded = topology.place(13, true);
        assert_eq!(crowded.teams.iter().map(|t| t.threads).sum::<usize>(), 13);
        assert!(crowded.teams.iter().all(|team| team.node.is_empty()));
    }

    #[test]
    fn threads_have_cpus_of_their_own_where_they_fill_a_node_and_the_node_where_they_do_not() {
        let cores = ["0,4", "1,5", "2,6", "3,7"];
        let system = System::new("pinned", &[(0, "0-7")], &cores);
        let topology = Topology::read(&system.0, &[0, 1, 2, 3, 4, 5, 6, 7]);
        let cpus = |threads| topology.place(threads, true).teams.remove(0).cpus;
        assert_eq!(cpus(8), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(cpus(4), [0, 1, 2, 3], "a core each");
        for threads in [1, 3, 5] {
            let team = topology.place(threads, true).teams.remove(0);
            assert_eq!((team.cpus.len(), team.node.len()), (0, 8));
        }
        assert!(topology.place(8, false).teams[0].cpus.is_empty());
    }

    #[test]
    fn emulated_nodes_divide_the_cpus_or_share_them() {
        let topology = Topology::read(Path::new("/nonexistent"), &[0, 1, 2, 3, 4]);
        let two = topology.emulated(2);
        assert_eq!(two.nodes, [node(0..3), node(3..5)]);
        assert_eq!(two.as_one(), topology);
        let eight = topology.emulated(8).place(8, true);
        assert_eq!(counts(&eight), [1; 8]);
        assert!(
            eight.teams.iter().all(|team| team.node.is_empty()),
            "threads that share a CPU are not pinned"
        );
    }

    #[test]
    fn a_visit_ends_where_it_began() {
        let before = allowed_cpus();
        if let Some(&last) = before.last() {
            let visit = Visit::to(&[last]);
            assert_eq!(allowed_cpus(), [last]);
            drop(visit);
            assert_eq!(allowed_cpus(), before);
        }
    }
}
