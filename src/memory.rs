//! The memory that this process may still take, the least that the machine, its control groups and its limits leave,
//! and the start of the threads, which need some of it.

use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Free bytes, as Linux counts them; other systems are not asked.
pub(crate) fn free() -> Option<usize> {
    let machine = || field(&read("/proc/meminfo")?, "MemAvailable:");
    let groups = || free_of_groups(&read("/proc/self/cgroup")?, Path::new("/sys/fs/cgroup"), &read);
    [machine(), groups(), free_address_space()].into_iter().flatten().min()
}

/// Starts rayon's threads, unless they run already or the caller is in a pool of its own. Left to start them at their
/// first use, rayon would panic where the system refuses one.
///
/// # Errors
/// [`crate::ErrorKind::OutOfMemory`]: there is no memory for the threads' stacks, or the limit of processes is reached.
/// [`crate::ErrorKind::Unsupported`]: the threads were started before the process was forked, and work would wait for
/// them forever.
pub(crate) fn start_threads() -> Result<()> {
    // Rayon tries once in a process, so the first answer stays.
    static REFUSED: OnceLock<Option<String>> = OnceLock::new();
    static PROCESS: OnceLock<u32> = OnceLock::new();
    if *PROCESS.get_or_init(std::process::id) != std::process::id() {
        let problem = "this process was forked from one that had used respodiff, whose threads are not here";
        return Err(Error::unsupported(crate::Subject::Run, problem)
            .advise("start processes anew (Python's \"spawn\"), or use respodiff after the fork alone"));
    }
    if rayon::current_thread_index().is_some() {
        return Ok(());
    }
    let refused = REFUSED.get_or_init(|| {
        let problem = rayon::ThreadPoolBuilder::new().build_global().err()?;
        // Threads that run already are an error as well, but none that the system has caused.
        Some(std::error::Error::source(&problem)?.to_string())
    });
    match refused {
        None => Ok(()),
        Some(problem) => Err(Error::out_of_memory(format!("cannot start the threads of the CPU: {problem}"))
            .advise("use fewer threads, or allow this process more memory")),
    }
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// A field of `/proc/meminfo` or `/proc/self/status`, whose unit is KiB, in bytes.
fn field(text: &str, name: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.split_whitespace().next()?.parse::<usize>().ok()? * 1024)
}

/// Bytes that the process's control groups leave, of version 1 or 2 (Linux's admin-guide/cgroup-v1/memory.rst and
/// cgroup-v2.rst). `own` is `/proc/self/cgroup`; a group's own limit counts, and those of all groups above it. Page
/// cache that can be dropped is free. In a container the root shows the container's own group.
fn free_of_groups(own: &str, root: &Path, read: &dyn Fn(PathBuf) -> Option<String>) -> Option<usize> {
    let mut least: Option<usize> = None;
    for line in own.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let names = match controllers {
            "" => ["", "memory.max", "memory.current", "inactive_file"],
            list if list.split(',').any(|name| name == "memory") => {
                ["memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"]
            }
            _ => continue,
        };
        let [folder, limit, used, cache] = names;
        let top = root.join(folder);
        let mut group = top.join(path.trim_start_matches('/'));
        loop {
            let number = |name: &str| read(group.join(name))?.trim().parse::<usize>().ok();
            if let (Some(limit), Some(used)) = (number(limit), number(used)) {
                let droppable = || {
                    let text = read(group.join("memory.stat"))?;
                    let value = text.lines().find_map(|line| line.strip_prefix(cache)?.strip_prefix(' '))?;
                    value.trim().parse::<usize>().ok()
                };
                let free = limit.saturating_sub(used.saturating_sub(droppable().unwrap_or(0)));
                least = Some(least.map_or(free, |least| least.min(free)));
            }
            if group == top || !group.pop() {
                break;
            }
        }
    }
    least
}

/// Bytes that the limit on the address space (`ulimit -v`) leaves.
#[cfg(target_os = "linux")]
fn free_address_space() -> Option<usize> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the argument is a live local.
    let answer = unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) };
    if answer != 0 || limit.rlim_cur == libc::RLIM_INFINITY {
        return None;
    }
    let used = field(&read("/proc/self/status")?, "VmSize:")?;
    Some((limit.rlim_cur as usize).saturating_sub(used))
}

#[cfg(not(target_os = "linux"))]
fn free_address_space() -> Option<usize> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn groups(own: &str, files: &[(&str, &str)]) -> Option<usize> {
        let files: HashMap<PathBuf, String> =
            files.iter().map(|(name, text)| (Path::new("/groups").join(name), text.to_string())).collect();
        free_of_groups(own, Path::new("/groups"), &|path| files.get(&path).cloned())
    }

    #[test]
    fn the_tightest_group_counts() {
        let unlimited = [("memory.max", "max\n"), ("memory.current", "5\n")];
        assert_eq!(groups("0::/\n", &unlimited), None);
        let container = [("memory.max", "1000\n"), ("memory.current", "400\n")];
        assert_eq!(groups("0::/\n", &container), Some(600));
        // Inside a container the path may be the host's, which is not there: the root is.
        assert_eq!(groups("0::/docker/0123\n", &container), Some(600));
        let nested = [
            ("memory.max", "max\n"),
            ("a/memory.max", "1000\n"),
            ("a/memory.current", "900\n"),
            ("a/memory.stat", "anon 600\ninactive_file 250\ninactive_file_x 1\n"),
            ("a/b/memory.max", "500\n"),
            ("a/b/memory.current", "100\n"),
        ];
        assert_eq!(groups("0::/a/b\n", &nested), Some(350));
        assert_eq!(groups("0::/a\n", &nested), Some(350));
        let over = [("memory.max", "10\n"), ("memory.current", "400\n")];
        assert_eq!(groups("0::/\n", &over), Some(0));
    }

    #[test]
    fn version_1_has_a_hierarchy_of_its_own() {
        let files = [
            ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory/memory.usage_in_bytes", "5000\n"),
            ("memory/box/memory.limit_in_bytes", "2000\n"),
            ("memory/box/memory.usage_in_bytes", "1500\n"),
            ("memory/box/memory.stat", "inactive_file 1\ntotal_inactive_file 300\n"),
        ];
        assert_eq!(groups("4:cpu,cpuacct:/box\n3:cpuset,memory:/box\n1:name=systemd:/x\n", &files), Some(800));
        assert_eq!(groups("nonsense\n", &files), None);
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(cfg!(not(target_os = "linux")) || free().is_some_and(|bytes| bytes > 1 << 20));
    }
}
