//! Recognises a file of an image by its first bytes: a kernel, an initial RAM disk, a root disk, or
//! another format. The refusal of another format names the command that makes the right file.

/// Number of first bytes that every check here needs: the superblock of btrfs starts at 64 KiB.
pub const HEAD_BYTES: usize = 68 * 1024;
/// Number of last bytes that hold the mark of a fixed VHD.
pub const TAIL_BYTES: usize = 512;

/// A file of an image with the bytes that the checks need.
#[derive(Debug, Clone, Copy)]
pub struct File<'a> {
    /// Name for messages.
    pub name: &'a str,
    /// The first [`HEAD_BYTES`] bytes, or the whole of a shorter file.
    pub head: &'a [u8],
    /// The last bytes, if they are known.
    pub tail: &'a [u8],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A file system that the kernel mounts by itself.
    FileSystem,
    /// A container that needs an initial RAM disk.
    Container,
    Partitions,
    Kernel,
    OtherKernel,
    InitialDisk,
    /// Compressed; holds the program that unpacks it.
    Compressed(&'static str),
    /// A disk format; holds qemu-img's name of it.
    Converted(&'static str),
    /// Another format; holds the advice.
    Wrong(&'static str),
    Blank,
    Unknown,
}

/// Marks: offset, bytes, name and kind. The first match counts.
#[rustfmt::skip]
const MARKS: &[(usize, &[u8], &str, Kind)] = &[
    (0x202, b"HdrS", "a bzImage kernel", Kind::Kernel),
    (0, b"\x7fELF", "an ELF file (a kernel or a program)", Kind::Kernel),
    (56, b"ARM\x64", "a kernel for another processor (arm64)", Kind::OtherKernel),
    (0, b"QFI\xfb", "a qcow2 disk", Kind::Converted("qcow2")),
    (0, b"KDMV", "a VMDK disk", Kind::Converted("vmdk")),
    (0, b"COWD", "a VMDK disk", Kind::Converted("vmdk")),
    (0, b"# Disk DescriptorFile", "the description of a VMDK disk", Kind::Converted("vmdk")),
    (0, b"vhdxfile", "a VHDX disk", Kind::Converted("vhdx")),
    (0, b"conectix", "a VHD disk", Kind::Converted("vpc")),
    (0x40, b"\x7f\x10\xda\xbe", "a VirtualBox disk", Kind::Converted("vdi")),
    (0, b"\x1f\x8b", "compressed with gzip", Kind::Compressed("gzip")),
    (0, b"\xfd7zXZ\0", "compressed with xz", Kind::Compressed("xz")),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", Kind::Compressed("zstd")),
    (0, b"BZh", "compressed with bzip2", Kind::Compressed("bzip2")),
    (0, b"\x02\x21\x4c\x18", "compressed with lz4", Kind::Compressed("lz4")),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", Kind::Compressed("lz4")),
    (0, b"\x5d\0\0", "compressed with lzma", Kind::Compressed("lzma")),
    (0, b"\x89LZO", "compressed with lzo", Kind::Compressed("lzop")),
    (0, b"070701", "an initial RAM disk (cpio)", Kind::InitialDisk),
    (0, b"070702", "an initial RAM disk (cpio)", Kind::InitialDisk),
    (0, b"PK\x03\x04", "a zip archive", Kind::Wrong("unpack it (`unzip FILE`) and name what is in it")),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", Kind::Wrong("unpack it (`7z x FILE`) and name what is in it")),
    (257, b"ustar", "a tar archive", Kind::Wrong(
        "if it is a root file system, make a disk of it: `mkdir tree && sudo tar -xpf FILE -C tree && truncate -s 2G \
         root.ext4 && sudo mkfs.ext4 -d tree root.ext4`")),
    (0x8001, b"CD001", "a CD image (ISO 9660)", Kind::Wrong(
        "an installer is no root disk: take the distribution's cloud image instead, and `qemu-img convert -O raw` it")),
    (0x438, b"\x53\xef", "an ext2, ext3 or ext4 file system", Kind::FileSystem),
    (0, b"XFSB", "an XFS file system", Kind::FileSystem),
    (0x10040, b"_BHRfS_M", "a btrfs file system", Kind::FileSystem),
    (0, b"hsqs", "a squashfs file system", Kind::FileSystem),
    (0x400, b"\xe2\xe1\xf5\xe0", "an EROFS file system", Kind::FileSystem),
    (0x400, b"\x10\x20\xf5\xf2", "an F2FS file system", Kind::FileSystem),
    (0, b"LUKS\xba\xbe", "a LUKS container", Kind::Container),
    (0x218, b"LVM2 001", "an LVM volume", Kind::Container),
    (0x200, b"EFI PART", "a disk with a GPT partition table", Kind::Partitions),
    (3, b"NTFS    ", "an NTFS file system", Kind::Wrong("Linux has no root on it: take a disk with ext4")),
    (0x36, b"FAT", "a FAT file system", Kind::Wrong("Linux has no root on it: take a disk with ext4")),
    (0x52, b"FAT32", "a FAT file system", Kind::Wrong("Linux has no root on it: take a disk with ext4")),
    (0, b"MZ", "an EFI or Windows program", Kind::Wrong(
        "if it is a unified kernel image, take the kernel out: `objcopy -O binary -j .linux FILE kernel`")),
    (0x1fe, b"\x55\xaa", "a disk with an MBR partition table", Kind::Partitions),
];

/// ELF machines other than x86: i386, ARM, ia64 (50), arm64, RISC-V.
const OTHER_MACHINES: &[u8] = &[3, 40, 50, 183, 243];

impl File<'_> {
    fn kind(&self) -> (&'static str, Kind) {
        let is_at = |at: usize, mark: &[u8]| self.head.get(at..).is_some_and(|rest| rest.starts_with(mark));
        if is_at(0, b"\x7fELF") && self.head.get(18).is_some_and(|machine| OTHER_MACHINES.contains(machine)) {
            return ("an ELF file for another processor", Kind::OtherKernel);
        }
        if let Some((_, _, name, kind)) = MARKS.iter().find(|(at, mark, _, _)| is_at(*at, mark)) {
            return (name, *kind);
        }
        if self.tail.starts_with(b"conectix") {
            return ("a VHD disk", Kind::Converted("vpc"));
        }
        if self.head.iter().all(|byte| *byte == 0) {
            return ("blank", Kind::Blank);
        }
        ("of no known kind", Kind::Unknown)
    }

    fn refusal(&self, wanted: &str, other: &str, way_out: &str) -> String {
        let way_out = way_out.replace("FILE", self.name);
        format!("{} is {other}, {wanted}: {way_out}", self.name)
    }

    /// Checks that the file is a kernel that the monitor boots.
    ///
    /// # Errors
    /// The format that the file has instead, and the advice.
    pub fn check_kernel(&self) -> Result<(), String> {
        let (other, kind) = self.kind();
        let wanted = "no kernel (ELF vmlinux or bzImage, x86-64)";
        let way_out = match kind {
            Kind::Kernel => return Ok(()),
            Kind::OtherKernel => "take the kernel of the distribution's amd64 or x86_64 edition".to_owned(),
            Kind::Compressed(program) => format!("unpack it with `{program} -dc < FILE > kernel`"),
            Kind::Wrong(way_out) => way_out.to_owned(),
            Kind::FileSystem | Kind::Container | Kind::Partitions | Kind::Converted(_) => {
                "name the kernel itself; a distribution has it in /boot/vmlinuz-VERSION".to_owned()
            }
            Kind::InitialDisk => "the manifest names it as kernel: it is the initrd".to_owned(),
            Kind::Blank | Kind::Unknown => "name a vmlinux, or /boot/vmlinuz-VERSION".to_owned(),
        };
        Err(self.refusal(wanted, other, &way_out))
    }

    /// Checks that the file is an initial RAM disk.
    ///
    /// # Errors
    /// The format that the file has instead, and the advice.
    pub fn check_initrd(&self) -> Result<(), String> {
        let (other, kind) = self.kind();
        if matches!(kind, Kind::InitialDisk | Kind::Compressed(_)) {
            return Ok(());
        }
        let way_out = "name a cpio archive, compressed or not, such as /boot/initrd.img-VERSION";
        Err(self.refusal("no initial RAM disk", other, way_out))
    }

    /// Checks that the file is a raw root disk, and that the kernel's command line fits its
    /// contents.
    ///
    /// # Errors
    /// The format that the file has, or the contradiction in the command line, and the advice.
    pub fn check_root(&self, boot_args: &str, has_initrd: bool) -> Result<(), String> {
        let (other, kind) = self.kind();
        let wanted = "no raw root disk";
        let named = boot_args.split_ascii_whitespace().rev().find_map(|word| word.strip_prefix("root="));
        let whole = named == Some("/dev/vda");
        let part = named.is_some_and(|name| name.starts_with("/dev/vda") && !whole);
        let way_out = match kind {
            Kind::FileSystem if part => {
                return Err(format!(
                    "{} is {other} without partitions, and boot_args names root={}: say root=/dev/vda",
                    self.name,
                    named.unwrap_or_default()
                ));
            }
            Kind::Partitions if whole => {
                return Err(format!(
                    "{0} is {other}, and boot_args names the whole disk as root: say root=/dev/vda1, or another \
                     that `fdisk -l {0}` lists",
                    self.name
                ));
            }
            Kind::FileSystem | Kind::Partitions => return Ok(()),
            Kind::Container | Kind::Blank | Kind::Unknown if has_initrd => return Ok(()),
            Kind::Converted("qcow2") if self.has_base() => {
                return Err(format!(
                    "{0} is a qcow2 disk that is incomplete without the file that it names as its base \
                     (`qemu-img info {0}`): ask whoever made it for a whole one",
                    self.name
                ));
            }
            Kind::Converted(format) => {
                format!(
                    "convert it with `qemu-img convert -f {format} -O raw FILE root.raw` and name root.raw"
                )
            }
            Kind::Compressed(program) => {
                format!("unpack it with `{program} -dc < FILE > root.raw` and name root.raw")
            }
            Kind::Wrong(way_out) => way_out.to_owned(),
            Kind::Kernel | Kind::OtherKernel | Kind::InitialDisk => {
                "kernel, initrd and root have changed places in the manifest".to_owned()
            }
            Kind::Container => "it takes an initrd that opens it".to_owned(),
            Kind::Blank => {
                "make a file system on it (`mkfs.ext4 FILE`) and fill it, or give an initrd".to_owned()
            }
            Kind::Unknown => "`file FILE` may tell what it is; a raw disk with ext4 is taken".to_owned(),
        };
        Err(self.refusal(wanted, other, &way_out))
    }

    /// Returns true if a qcow2 header names a backing file: bytes 8 to 16 hold its offset.
    fn has_base(&self) -> bool {
        self.head.get(8..16).is_some_and(|offset| offset.iter().any(|byte| *byte != 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Zeros with this mark in it.
    fn with(at: usize, mark: &[u8]) -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        head[at..at + mark.len()].copy_from_slice(mark);
        head
    }

    fn file(head: &[u8]) -> File<'_> {
        File { name: "x.img", head, tail: &[] }
    }

    const ARGS: &str = "console=ttyS0 root=/dev/vda rw";

    #[test]
    fn every_kind_of_file_is_taken_in_its_place_and_refused_in_every_other() {
        for (at, mark, name, kind) in MARKS {
            let head = with(*at, mark);
            let args = if *kind == Kind::Partitions { "root=/dev/vda1" } else { ARGS };
            let root = file(&head).check_root(args, false);
            assert_eq!(root.is_ok(), matches!(kind, Kind::FileSystem | Kind::Partitions), "{name}: {root:?}");
            let kernel = file(&head).check_kernel();
            assert_eq!(kernel.is_ok(), *kind == Kind::Kernel, "{name}: {kernel:?}");
            let initrd = file(&head).check_initrd();
            let is_initrd = matches!(kind, Kind::InitialDisk | Kind::Compressed(_));
            assert_eq!(initrd.is_ok(), is_initrd, "{name}: {initrd:?}");
            for why in [root, kernel, initrd].into_iter().filter_map(Result::err) {
                assert!(why.starts_with(&format!("x.img is {name}, no ")), "{why}");
                assert!(!why.contains("FILE"), "{why}");
            }
        }
    }

    #[test]
    fn other_formats_are_refused_with_the_command_that_converts_them() {
        let says = |head: &[u8]| file(head).check_root(ARGS, true).unwrap_err();
        assert!(says(&with(0, b"QFI\xfb")).contains("`qemu-img convert -f qcow2 -O raw x.img root.raw`"));
        assert!(says(&with(0, b"KDMV")).contains("-f vmdk"));
        assert!(says(&with(0, b"\xfd7zXZ\0")).contains("`xz -dc < x.img > root.raw`"));
        assert!(says(&with(257, b"ustar")).contains("tar -xpf x.img"));
        let mut overlay = with(0, b"QFI\xfb");
        overlay[15] = 1;
        assert!(says(&overlay).contains("incomplete"), "{}", says(&overlay));
        let vhd = File { tail: b"conectix", ..file(&[7; 4096]) };
        assert!(vhd.check_root(ARGS, false).unwrap_err().contains("-f vpc"));
    }

    #[test]
    fn a_disk_with_partitions_and_one_without_are_named_as_what_they_are() {
        let (ext4, gpt) = (with(0x438, b"\x53\xef"), with(0x200, b"EFI PART"));
        assert!(file(&ext4).check_root("root=/dev/vda1", false).unwrap_err().contains("say root=/dev/vda"));
        assert!(file(&gpt).check_root(ARGS, false).unwrap_err().contains("fdisk -l x.img"));
        for args in ["root=PARTUUID=12", "root=LABEL=root", "root=/dev/vda root=/dev/vda2", ""] {
            assert_eq!(file(&gpt).check_root(args, false), Ok(()), "{args}");
        }
    }

    #[test]
    fn what_a_kernel_alone_cannot_mount_takes_an_initial_ram_disk() {
        for head in [vec![0; 4096], vec![7; 4096], with(0, b"LUKS\xba\xbe"), vec![]] {
            assert_eq!(file(&head).check_root(ARGS, true), Ok(()));
            assert!(file(&head).check_root(ARGS, false).is_err());
        }
    }

    #[test]
    fn a_kernel_for_another_processor_is_told() {
        let mut elf = with(0, b"\x7fELF");
        assert_eq!(file(&elf).check_kernel(), Ok(()));
        elf[18] = 183;
        assert!(file(&elf).check_kernel().unwrap_err().contains("another processor"));
    }
}
