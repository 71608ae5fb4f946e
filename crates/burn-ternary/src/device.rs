//! Devices by name, and properties of the machine.
//!
//! ndarray and libtorch are deprecated in Burn and still supported here.
#![allow(deprecated)]

use std::{fs, sync::Once};

use burn::tensor::Device;
use ternary_format::{
    print_stderr,
    threads::{self, ThreadError},
};

/// Every backend by its Cargo feature, in the order of `auto`.
const NAMES: [&str; 5] = ["cuda", "wgpu", "tch", "ndarray", "flex"];

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// No such name.
    #[error(
        "unknown device `{name}`: expected auto, {}; compiled in: {}",
        NAMES.join(", "),
        compiled().join(", ")
    )]
    Unknown {
        /// The name.
        name: String,
    },
    /// Its Cargo feature is off.
    #[error(
        "device `{name}` was not compiled in: build with `--features {name}`; compiled in: {}",
        compiled().join(", ")
    )]
    NotCompiled {
        /// The name.
        name: String,
    },
    /// The machine has no such hardware.
    #[error(
        "device `{name}` was not found on this machine (no graphics card or no driver); compiled in: {}",
        compiled().join(", ")
    )]
    Missing {
        /// The name.
        name: String,
    },
    /// The Cargo features of all backends are off.
    #[error(
        "no device was compiled in: build with `--features NAME`, one of {}",
        NAMES.join(", ")
    )]
    NoneCompiled,
}

/// The backends of this build, in the order of `auto`.
pub fn compiled() -> Vec<&'static str> {
    NAMES.into_iter().filter(|name| construct(name).is_some()).collect()
}

/// The device of a name: `auto`, `flex`, `ndarray`, `wgpu`, `tch` or `cuda`. `auto` is the first of cuda, wgpu, tch, ndarray and
/// flex that is compiled in; a software renderer is passed over for the next one, with a line on standard error.
///
/// # Errors
/// `Unknown`: no such name. `NotCompiled`, `NoneCompiled`: a Cargo feature is off. `Missing`: the machine has no
/// such hardware. `auto` does not fall back to another device for that, since such a run would only look slow.
pub fn device(name: &str) -> Result<Device, DeviceError> {
    let name = match name {
        "auto" => automatic()?,
        _ => name,
    };
    let owned = || name.to_owned();
    if !NAMES.contains(&name) {
        return Err(DeviceError::Unknown { name: owned() });
    }
    let device = construct(name).ok_or_else(|| DeviceError::NotCompiled { name: owned() })?;
    if present(name) { Ok(device) } else { Err(DeviceError::Missing { name: owned() }) }
}

/// The name of the device that `auto` is.
fn automatic() -> Result<&'static str, DeviceError> {
    static PASSED_OVER: Once = Once::new();
    let names = compiled();
    let first = *names.first().ok_or(DeviceError::NoneCompiled)?;
    let renderer = |name: &str| present(name) && construct(name).is_some_and(|device| is_software(&device));
    let chosen = names.into_iter().find(|name| !renderer(name)).unwrap_or(first);
    if chosen != first {
        PASSED_OVER.call_once(|| {
            print_stderr(format_args!(
                "device auto: {first} is a software renderer here, so {chosen} is used; --device {first} selects it"
            ));
        });
    }
    Ok(chosen)
}

/// Name and hardware of a device, as in `flex (AMD EPYC 7B13)`, for `result.json`.
pub fn describe(device: &Device) -> String {
    let Some(name) = compiled().into_iter().find(|name| construct(name).as_ref() == Some(device)) else {
        return format!("{device:?}");
    };
    match hardware(device) {
        Some(hardware) => format!("{name} ({hardware})"),
        None => name.to_owned(),
    }
}

/// The instruction sets of the processor that decide the last bits of floating-point results, as the libraries below choose among
/// them at run time.
pub(crate) fn instruction_sets() -> String {
    #[cfg(target_arch = "x86_64")]
    let found = {
        let sets = [
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("f16c", is_x86_feature_detected!("f16c")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bw", is_x86_feature_detected!("avx512bw")),
            ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
        ];
        sets.iter().filter(|(_, found)| *found).map(|(name, _)| *name).collect::<Vec<_>>().join(" ")
    };
    #[cfg(not(target_arch = "x86_64"))]
    let found = std::env::consts::ARCH;
    // A choice of the user, for tests.
    let chosen = std::env::var("TERNARY_ISA").unwrap_or_default();
    format!("{} {found} {chosen}", std::env::consts::ARCH).trim().to_string()
}

/// Whether the device computes on the processor, in the memory of this process.
pub fn is_cpu(device: &Device) -> bool {
    !["wgpu", "cuda"].iter().any(|name| construct(name).as_ref() == Some(device))
}

/// Whether the GPU is a software renderer (such as llvmpipe), which is slower than flex.
pub fn is_software(device: &Device) -> bool {
    !is_cpu(device) && hardware(device).is_some_and(|adapter| is_renderer(&adapter))
}

/// Whether a driver describes an adapter as a software renderer.
fn is_renderer(adapter: &str) -> bool {
    const RENDERERS: [&str; 4] = ["llvmpipe", "softpipe", "SwiftShader", "Basic Render"];
    RENDERERS.iter().any(|name| adapter.contains(name))
}

/// Peak resident memory of this process, in bytes; `None` if the system does not report it.
pub fn peak_rss_bytes() -> Option<u64> {
    kibibytes("/proc/self/status", "VmHWM")
}

/// Starts the threads that training computes on, so that a failure is an error instead of a panic later.
///
/// # Errors
/// Those of [`threads::start`].
pub fn start_threads() -> Result<(), ThreadError> {
    let threads = threads::start()?;
    #[cfg(feature = "flex")]
    crate::ops::start_threads(threads).map_err(|source| ThreadError::Start { threads, source })?;
    let _ = threads;
    Ok(())
}

/// `None` if the feature of the backend is off. Opens no hardware.
fn construct(name: &str) -> Option<Device> {
    match name {
        #[cfg(feature = "flex")]
        "flex" => Some(Device::flex()),
        #[cfg(feature = "ndarray")]
        "ndarray" => Some(Device::ndarray()),
        #[cfg(feature = "tch")]
        "tch" => Some(Device::libtorch()),
        #[cfg(feature = "wgpu")]
        "wgpu" => Some(Device::wgpu(Default::default())),
        #[cfg(feature = "cuda")]
        "cuda" => Some(Device::cuda(0)),
        _ => None,
    }
}

/// Whether the machine has the hardware; without it, Burn panics at the first tensor.
fn present(name: &str) -> bool {
    match name {
        #[cfg(feature = "wgpu")]
        "wgpu" => !Device::enumerate(burn::tensor::DeviceType::Wgpu).is_empty(),
        #[cfg(feature = "cuda")]
        "cuda" => !Device::enumerate(burn::tensor::DeviceType::Cuda).is_empty(),
        _ => true,
    }
}

fn hardware(device: &Device) -> Option<String> {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    if let Some(identity) = device.identity() {
        return Some(identity.name);
    }
    let _ = device;
    field("/proc/cpuinfo", "model name")
}

fn kibibytes(file: &str, key: &str) -> Option<u64> {
    let value = field(file, key)?;
    let number: u64 = value.strip_suffix("kB")?.trim().parse().ok()?;
    Some(number * 1024)
}

/// The first value of `key` in a file of `key: value` lines.
fn field(file: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found.trim() == key).then(|| value.trim().to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Tensor;

    #[test]
    fn every_compiled_device_computes_and_has_its_name() {
        for name in compiled() {
            let device = match device(name) {
                Err(DeviceError::Missing { name }) => {
                    println!("skipped: no {name} on this machine");
                    continue;
                }
                device => device.unwrap(),
            };
            let sum = Tensor::<1>::from_floats([1.0, 2.0, 4.0], &device).sum();
            assert_eq!(sum.into_scalar::<f32>(), 7.0, "{name}");
            for device in [device.clone(), device.autodiff()] {
                let described = describe(&device);
                assert_eq!(described.split(' ').next(), Some(name), "{described}");
                assert_eq!(is_software(&device), described.contains("llvmpipe"), "{described}");
            }
        }
    }

    #[test]
    fn software_renderers_are_known_by_their_description() {
        for adapter in [
            "llvmpipe (LLVM 19.1.7, 256 bits)",
            "SwiftShader Device (Subzero)",
            "Microsoft Basic Render Driver",
        ] {
            assert!(is_renderer(adapter), "{adapter}");
        }
        for adapter in ["NVIDIA H100 PCIe", "AMD Radeon RX 7900 XT (RADV NAVI31)", "Apple M3"] {
            assert!(!is_renderer(adapter), "{adapter}");
        }
    }

    #[test]
    fn auto_is_the_first_compiled_in_that_is_no_software_renderer() {
        let order = ["cuda", "wgpu", "tch", "ndarray", "flex"];
        let mut position = 0;
        for name in compiled() {
            position += order[position..].iter().position(|&n| n == name).unwrap();
        }
        match device("auto") {
            Ok(auto) => {
                let mut devices = compiled().into_iter().map(|name| construct(name).unwrap());
                let expected = devices.find(|device| compiled().len() == 1 || !is_software(device));
                assert_eq!(auto, expected.unwrap());
            }
            Err(error) => assert!(matches!(error, DeviceError::Missing { .. }), "{error}"),
        }
    }

    #[cfg(feature = "flex")]
    #[test]
    fn flex_is_there() {
        assert!(compiled().contains(&"flex"));
        assert_eq!(device("flex").unwrap(), Device::flex());
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_known_ones() {
        for name in ["", "gpu", "Flex", "cuda:0"] {
            let error = device(name).unwrap_err().to_string();
            assert!(error.contains(&format!("unknown device `{name}`")), "{error}");
            assert!(error.ends_with(&compiled().join(", ")), "{error}");
            for name in NAMES {
                assert!(error.contains(name), "{error}");
            }
        }
        for name in NAMES {
            if !compiled().contains(&name) {
                let error = device(name).unwrap_err().to_string();
                assert!(error.contains(&format!("`--features {name}`")), "{error}");
                assert!(error.ends_with(&compiled().join(", ")), "{error}");
            }
        }
    }

    #[test]
    fn peak_memory_is_in_bytes() {
        let Some(before) = peak_rss_bytes() else {
            println!("skipped: the system does not report the peak memory");
            return;
        };
        let size = 64 << 20;
        let touched = vec![1u8; size];
        let after = peak_rss_bytes().unwrap();
        assert_eq!(std::hint::black_box(&touched)[size - 1], 1);
        assert!(after >= before, "{after} after a peak of {before}");
        assert!(after >= size as u64, "{after} bytes with {size} touched");
        assert!(after < 1 << 40, "{after} is not in bytes");
    }

    #[test]
    fn a_file_without_the_field_gives_none() {
        assert_eq!(kibibytes("/proc/self/status", "NoSuchField"), None);
        assert_eq!(kibibytes("/proc/self/status", "Name"), None);
        assert_eq!(kibibytes("/no/such/file", "VmHWM"), None);
    }
}
