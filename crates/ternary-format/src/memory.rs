//! [`available`]: how much memory this process can still allocate, and which limit decides.

use std::{
    error::Error,
    fmt, fs, io,
    path::{Path, PathBuf},
};

/// A limit on the memory of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Limit {
    /// Free memory of the machine.
    Machine,
    /// A memory cgroup, for example of a container: its folder.
    Cgroup(PathBuf),
    /// Limit of the address space, `ulimit -v`.
    AddressSpace,
    /// Limit of the data segment, `ulimit -d`.
    Data,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine => f.write_str("this machine has no more free memory: close other programs"),
            Self::Cgroup(path) => {
                write!(
                    f,
                    "the memory cgroup {} (a container?) allows no more: raise its limit",
                    path.display()
                )
            }
            Self::AddressSpace => f.write_str("the address space is limited: raise it with `ulimit -v`"),
            Self::Data => f.write_str("the data segment is limited: raise it with `ulimit -d`"),
        }
    }
}

/// Memory that can still be allocated.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Available {
    /// Bytes left.
    pub bytes: u64,
    /// The limit that leaves the least.
    pub limit: Limit,
}

/// An operation needs more memory than is available.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("about {} MiB of memory are needed and {} MiB are available; {}", needed >> 20, available.bytes >> 20, available.limit)]
#[non_exhaustive]
pub struct OutOfMemory {
    /// Bytes needed.
    pub needed: u64,
    /// Bytes available, and the limit that decides.
    pub available: Available,
}

/// Memory that this process can allocate without swapping: the minimum over free memory, memory cgroups (v1 and v2,
/// with all their ancestors) and resource limits. `None` if the system does not report any of them.
pub fn available() -> Option<Available> {
    available_in(Path::new("/"))
}

/// Checks that `needed` bytes are [`available`].
///
/// # Errors
/// [`OutOfMemory`]: fewer are available.
pub fn check(needed: u64) -> Result<(), OutOfMemory> {
    match available() {
        Some(available) if needed > available.bytes => Err(OutOfMemory { needed, available }),
        _ => Ok(()),
    }
}

/// Returns whether the error, or one of its sources, is an allocation that the system refused.
pub fn is_cause_of(error: &(dyn Error + 'static)) -> bool {
    std::iter::successors(Some(error), |&error| error.source()).any(|error| {
        let io = error.downcast_ref::<io::Error>();
        io.is_some_and(|error| error.kind() == io::ErrorKind::OutOfMemory) || error.is::<OutOfMemory>()
    })
}

fn available_in(root: &Path) -> Option<Available> {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let status = read("proc/self/status");
    let limits = read("proc/self/limits");
    let machine = field(&read("proc/meminfo"), "MemAvailable:").map(|kib| (kib << 10, Limit::Machine));
    // Limits are in bytes, usage is in KiB.
    let resource = |name: &str, used: &str, limit: Limit| {
        let most = field(&limits, name)?;
        Some((most.saturating_sub(field(&status, used)? << 10), limit))
    };
    let resources = [
        resource("Max address space", "VmSize:", Limit::AddressSpace),
        resource("Max data size", "VmData:", Limit::Data),
    ];
    let cgroups = cgroups(&read("proc/self/cgroup"), &read("proc/self/mountinfo"));
    let cgroups = cgroups.into_iter().filter_map(|folder| {
        let bytes = left_in_cgroup(&root.join(folder.strip_prefix("/").unwrap_or(&folder)))?;
        Some((bytes, Limit::Cgroup(folder)))
    });
    let all = machine.into_iter().chain(resources.into_iter().flatten()).chain(cgroups);
    all.min_by_key(|(bytes, _)| *bytes).map(|(bytes, limit)| Available { bytes, limit })
}

/// The number after `key` at the start of a line; `None` for words such as `unlimited`.
fn field(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key))?;
    value.split_whitespace().next()?.parse().ok()
}

/// Folders of the memory cgroup of this process and of its ancestors, in both versions of cgroups.
fn cgroups(own: &str, mounts: &str) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for mount in mounts.lines() {
        let Some((place, system)) = mount.split_once(" - ") else { continue };
        let place: Vec<&str> = place.split(' ').collect();
        let system: Vec<&str> = system.split(' ').collect();
        let ([_, _, _, root, mount, ..], [kind, _, options, ..]) = (&place[..], &system[..]) else {
            continue;
        };
        let of_memory = |list: &str| list.split(',').any(|name| name == "memory");
        if *kind != "cgroup2" && !(*kind == "cgroup" && of_memory(options)) {
            continue;
        }
        let path = own.lines().find_map(|line| {
            let (_, line) = line.split_once(':')?;
            let (controllers, path) = line.split_once(':')?;
            let is_own = if *kind == "cgroup2" { controllers.is_empty() } else { of_memory(controllers) };
            is_own.then_some(path)
        });
        let Some(path) = path else { continue };
        // In a container, the mount may start at the own group, or the path may name a group outside of it.
        let inner = Path::new(path).strip_prefix(root).unwrap_or(Path::new(""));
        folders.extend(inner.ancestors().map(|inner| Path::new(mount).join(inner)));
    }
    folders
}

/// Bytes that a cgroup may still allocate. Inactive file cache counts as free, since the kernel can drop it.
fn left_in_cgroup(folder: &Path) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let (most, used, cache) = match number("memory.max") {
        Some(most) => (most, number("memory.current")?, "inactive_file "),
        None => (number("memory.limit_in_bytes")?, number("memory.usage_in_bytes")?, "total_inactive_file "),
    };
    let cache = read("memory.stat").and_then(|stat| field(&stat, cache)).unwrap_or(0);
    Some(most.saturating_sub(used.saturating_sub(cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A machine with 8 GiB of free memory, and the given files.
    fn machine(files: &[(&str, &str)]) -> Option<Available> {
        let root = tempfile::tempdir().unwrap();
        let common = [
            ("proc/meminfo", "MemTotal: 9999999 kB\nMemAvailable:    8388608 kB\n"),
            ("proc/self/status", "VmSize:\t  102400 kB\nVmData:\t   51200 kB\n"),
        ];
        for (path, text) in common.iter().chain(files) {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        available_in(root.path())
    }

    fn limits(address_space: &str, data: &str) -> String {
        format!(
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max data size             {data:<21}unlimited            bytes     \n\
             Max address space         {address_space:<21}unlimited            bytes     \n"
        )
    }

    #[test]
    fn the_smallest_limit_decides_and_is_named() {
        let (v2, v1) = (
            "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
            "35 31 0:32 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n\
             36 31 0:33 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu\n",
        );
        let found =
            |files: &[(&str, &str)]| machine(files).map(|found| (found.bytes / MIB, found.limit)).unwrap();
        let cgroup = |path: &str| Limit::Cgroup(path.into());

        assert_eq!(found(&[]), (8192, Limit::Machine));
        let files = &[("proc/self/limits", &*limits("unlimited", "unlimited"))];
        assert_eq!(found(files), (8192, Limit::Machine));
        let files = &[("proc/self/limits", &*limits("314572800", "unlimited"))];
        assert_eq!(found(files), (200, Limit::AddressSpace));
        let files = &[("proc/self/limits", &*limits("314572800", "104857600"))];
        assert_eq!(found(files), (50, Limit::Data));
        let files = &[("proc/self/limits", &*limits("1000", "unlimited"))];
        assert_eq!(found(files), (0, Limit::AddressSpace));

        // Version 2: the group itself is not limited, its parent is.
        let files = &[
            ("proc/self/cgroup", "0::/user.slice/job\n"),
            ("proc/self/mountinfo", v2),
            ("sys/fs/cgroup/user.slice/job/memory.max", "max\n"),
            ("sys/fs/cgroup/user.slice/job/memory.current", "1\n"),
            ("sys/fs/cgroup/user.slice/memory.max", "1073741824\n"),
            ("sys/fs/cgroup/user.slice/memory.current", "536870912\n"),
            (
                "sys/fs/cgroup/user.slice/memory.stat",
                "anon 1\nfile 2\ninactive_file 268435456\nactive_file 5\n",
            ),
        ];
        assert_eq!(found(files), (768, cgroup("/sys/fs/cgroup/user.slice")));

        // Version 1, in a container that sees its own group as the root of the mount.
        let inside = v1.replace("0:32 / ", "0:32 /docker/abc ");
        let files = &[
            ("proc/self/cgroup", "4:memory:/docker/abc\n1:cpu:/docker/abc\n0::/\n"),
            ("proc/self/mountinfo", &*inside),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "104857600\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "94371840\n"),
            ("sys/fs/cgroup/memory/memory.stat", "inactive_file 0\ntotal_inactive_file 20971520\n"),
        ];
        assert_eq!(found(files), (30, cgroup("/sys/fs/cgroup/memory/")));

        // Both versions: the smaller limit.
        let both = format!("{v1}{}", v2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified "));
        let files = &[
            ("proc/self/cgroup", "4:memory:/a/b\n0::/c\n"),
            ("proc/self/mountinfo", &*both),
            ("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", "0\n"),
            ("sys/fs/cgroup/unified/c/memory.max", "20971520\n"),
            ("sys/fs/cgroup/unified/c/memory.current", "10485760\n"),
        ];
        assert_eq!(found(files), (10, cgroup("/sys/fs/cgroup/unified/c")));
    }

    #[test]
    fn a_system_without_memory_information_has_no_limit() {
        assert_eq!(available_in(Path::new("/no/such/root")), None);
    }

    #[test]
    fn this_machine_reports_a_plausible_amount_of_memory() {
        let Some(found) = available() else {
            println!("skipped: the system does not report its available memory");
            return;
        };
        assert!((1 << 20..1 << 44).contains(&found.bytes), "{found:?}");
        check(1).unwrap();
        let error = check(u64::MAX).unwrap_err();
        assert!(is_cause_of(&error) && error.to_string().contains("MiB are available; "), "{error}");
    }

    #[test]
    fn a_refused_allocation_is_found_among_the_sources_of_an_error() {
        let io = |kind| crate::FormatError::Io { path: "m.gguf".into(), source: io::Error::from(kind) };
        assert!(is_cause_of(&io(io::ErrorKind::OutOfMemory).in_tensor("t")));
        assert!(!is_cause_of(&io(io::ErrorKind::NotFound)));
    }
}
