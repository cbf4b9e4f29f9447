//! QEMU's command line: a pure function of what is wanted.

use super::Accelerator;
use std::path::{Path, PathBuf};

/// Everything that decides how the machine looks.
#[derive(Debug, Clone)]
pub(super) struct Machine<'a> {
    pub name: &'a str,
    pub accelerator: Accelerator,
    pub cpus: u32,
    /// Features that its CPUs do not have.
    pub lacks: &'a [String],
    pub memory_mib: u32,
    /// Folder with `kernel`, `initrd` and `root.ext4`.
    pub image: &'a Path,
    pub boot_args: &'a str,
    pub data_disk: &'a Path,
    /// The data disk outlives the machine: writes must reach it.
    pub durable: bool,
    pub identity_disk: &'a Path,
    pub share_disks: &'a [PathBuf],
    /// Ports of 127.0.0.1 and the ports inside that they reach.
    pub forwards: &'a [(u16, u16)],
    pub console: &'a Path,
}

/// The outside world as the virtual host sees it: addresses that are set aside for documentation
/// (RFC 5737), so that neither a VPC nor a real network of the user collides with them. QEMU hands
/// what is sent to `host` to the loopback of the machine outside; `wall_to_the_outside` in the
/// image's `host-setup` lets only answers through.
const NETWORK: &str = "net=192.0.2.0/24,host=192.0.2.2,dns=192.0.2.3,ipv6=off";
const ADDRESS: &str = "192.0.2.15";

impl Machine<'_> {
    pub fn arguments(&self) -> Vec<String> {
        let mut all: Vec<String> = Vec::new();
        let mut add = |words: &[&str]| all.extend(words.iter().map(|&word| word.to_owned()));
        add(&["-name", &format!("roost-{}", self.name), "-M", "q35"]);
        add(&self.accelerator.arguments(self.lacks).each_ref().map(String::as_str));
        add(&["-smp", &self.cpus.to_string(), "-m", &self.memory_mib.to_string()]);
        add(&["-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-no-reboot"]);
        add(&["-serial", &console_word(self.console)]);
        add(&["-kernel", &self.image.join("kernel").display().to_string()]);
        add(&["-initrd", &self.image.join("initrd").display().to_string()]);
        add(&["-append", &format!("{}{}", self.boot_args, self.accelerator.boot_args())]);
        add(&["-device", "virtio-rng-pci"]);

        let mut disk = |serial: &str, path: &Path, mode: &str| {
            let drive = format!("if=none,id={serial},format=raw,file={},{mode}", quoted(path));
            all.extend(["-drive".to_owned(), drive]);
            all.extend(["-device".to_owned(), format!("virtio-blk-pci,drive={serial},serial={serial}")]);
        };
        // The base is never written: `snapshot` puts a nameless temporary layer over it.
        disk("root", &self.image.join("root.ext4"), "snapshot=on,cache=unsafe");
        disk("data", self.data_disk, if self.durable { "cache=writeback" } else { "cache=unsafe" });
        disk("identity", self.identity_disk, "readonly=on");
        for (i, share) in self.share_disks.iter().enumerate() {
            disk(&format!("share{i}"), share, "readonly=on");
        }

        let mut network = format!("user,id=net0,{NETWORK}");
        for (outside, inside) in self.forwards {
            network.push_str(&format!(",hostfwd=tcp:127.0.0.1:{outside}-{ADDRESS}:{inside}"));
        }
        all.extend([
            "-netdev".to_owned(),
            network,
            "-device".to_owned(),
            "virtio-net-pci,netdev=net0".to_owned(),
        ]);
        all
    }
}

/// The word of the command line that no other virtual host has.
pub(super) fn console_word(console: &Path) -> String {
    format!("file:{}", quoted(console))
}

/// A comma in a path is doubled in QEMU's option lists.
fn quoted(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::{Accelerator, Machine};
    use std::path::{Path, PathBuf};

    fn arguments(durable: bool) -> String {
        arguments_on(Accelerator::Tcg, durable)
    }

    fn arguments_on(accelerator: Accelerator, durable: bool) -> String {
        Machine {
            name: "t",
            accelerator,
            cpus: 3,
            lacks: &["avx2".to_owned(), "bmi1".to_owned()],
            memory_mib: 2048,
            image: Path::new("/i"),
            boot_args: "root=/dev/vda",
            data_disk: Path::new("/s,x/data.img"),
            durable,
            identity_disk: Path::new("/s/identity.img"),
            share_disks: &[PathBuf::from("/c/bin.img"), PathBuf::from("/c/scripts.img")],
            forwards: &[(40022, 22), (7443, 7443)],
            console: Path::new("/s/console"),
        }
        .arguments()
        .join(" ")
    }

    #[test]
    fn the_base_is_never_written_and_kept_data_always_is() {
        let kept = arguments(true);
        assert!(kept.contains("file=/i/root.ext4,snapshot=on"), "{kept}");
        assert!(kept.contains("id=data,format=raw,file=/s,,x/data.img,cache=writeback"), "{kept}");
        assert!(arguments(false).contains("/s,,x/data.img,cache=unsafe"));
    }

    #[test]
    fn what_its_cpus_lack_is_taken_from_what_there_is() {
        let all = arguments(true);
        assert!(all.contains("-cpu max,-la57,-avx2,-bmi1 "), "{all}");
    }

    #[test]
    fn mitigations_are_off_only_where_the_cpu_is_emulated() {
        let emulated = arguments_on(Accelerator::Tcg, false);
        assert!(emulated.contains("-append root=/dev/vda mitigations=off "), "{emulated}");
        let hardware = arguments_on(Accelerator::Kvm, false);
        assert!(hardware.contains("-append root=/dev/vda "), "{hardware}");
        assert!(!hardware.contains("mitigations"), "{hardware}");
        // The recipe's own arguments apply to both.
        let recipe = super::super::repository_root().join("guest-images/recipes/virtual-host/recipe.sh");
        let recipe = std::fs::read_to_string(recipe).expect("the recipe is in the checkout");
        assert!(!recipe.contains("mitigations"), "guest-images/recipes/virtual-host/recipe.sh");
    }

    #[test]
    fn ports_are_forwarded_from_loopback_only() {
        let all = arguments(true);
        assert_eq!(all.matches("hostfwd=tcp:127.0.0.1:").count(), 2, "{all}");
        assert_eq!(all.matches("hostfwd=").count(), 2, "{all}");
    }

    #[test]
    fn each_share_is_a_read_only_disk_that_is_found_by_its_serial() {
        let all = arguments(true);
        for i in 0..2 {
            assert!(all.contains(&format!("drive=share{i},serial=share{i}")), "{all}");
        }
        assert_eq!(all.matches("readonly=on").count(), 3, "{all}");
    }
}
