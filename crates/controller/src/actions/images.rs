//! Images: a kernel, perhaps an initial RAM disk, a root disk, all uploaded before as blobs.

use super::{Answer, printable};
use crate::auth::internal;
use crate::engine::Caller;
use crate::server::Front;
use roost_store::{ImageRow, StoreError};
use roost_types::api::{DeregisterImage, DescribeImages, Done, Image, Images, RegisterImage};
use roost_types::{ApiError, BlobId, ErrorCode, ID_BYTES, ImageId};
use std::fs::File;
use std::io::Read;
use std::path::Path;

const GIB: u64 = 1 << 30;
/// Longest header of a zstd frame.
const ZSTD_HEADER_BYTES: u64 = 18;
/// 16 TiB, EBS's own largest volume.
const MAX_ROOT_BYTES: u64 = 16 << 40;

pub(super) fn register(front: &Front, caller: &Caller, request: RegisterImage) -> Answer<Image> {
    printable("name", &request.name, 1, 128)?;
    check_no_id("name", &request.name)?;
    printable("description", &request.description, 0, 255)?;
    check_boot_args(&request.boot_args)?;
    check_user(&request.default_user)?;
    if !(1..=MAX_ROOT_BYTES).contains(&request.root_bytes) {
        return Err(ApiError::new(
            ErrorCode::InvalidParameterValue,
            format!("root_bytes is {}, allowed are 1 to {MAX_ROOT_BYTES}", request.root_bytes),
        ));
    }
    let blobs = [
        ("kernel", Some(&request.kernel)),
        ("initrd", request.initrd.as_ref()),
        ("root", Some(&request.root)),
    ];
    for (parameter, blob) in blobs {
        blob.map_or(Ok(()), |id| check_blob(front, caller, parameter, id))?;
    }
    check_root_bytes(&front.blobs.path(&request.root), request.root_bytes)?;
    let mut id = [0; ID_BYTES];
    front.random.fill(&mut id);
    let image = Image {
        image_id: ImageId::from_random(id),
        owner: caller.account_id.clone(),
        name: request.name,
        description: request.description,
        public: caller.admin,
        min_volume_gib: request.root_bytes.div_ceil(GIB),
        boot_args: request.boot_args,
        default_user: request.default_user,
        ssh: request.ssh,
        created_at: front.clock.now(),
    };
    let row = ImageRow {
        image,
        kernel: request.kernel,
        initrd: request.initrd,
        root: request.root,
        root_bytes: request.root_bytes,
        deregistered_at: None,
    };
    let registered = front.store.register_image(&row);
    if let Err(StoreError::Duplicate { .. }) = registered {
        // The same image again is no mistake: an import that was cut off is simply repeated.
        let known = front.store.find_image(&caller.account_id, &row.image.name).map_err(internal)?;
        if let Some(known) = known.filter(|known| is_same(known, &row)) {
            return Ok(known.image);
        }
    }
    registered.map_err(|error| match error {
        StoreError::Duplicate { .. } => ApiError::new(
            ErrorCode::InvalidAmiNameDuplicate,
            format!("an image {:?} exists already: deregister it or choose another name", row.image.name),
        ),
        StoreError::Missing { value, .. } => {
            ApiError::new(ErrorCode::InvalidBlobNotFound, format!("blob {value:?} was not uploaded"))
        }
        other => internal(other),
    })?;
    Ok(row.image)
}

/// Whether two images of one name are of one owner and of the same parts.
fn is_same(one: &ImageRow, other: &ImageRow) -> bool {
    let parts = |row: &ImageRow| {
        let image = &row.image;
        let words = [&image.description, &image.boot_args, &image.default_user].map(String::clone);
        (
            image.owner.clone(),
            image.ssh,
            row.kernel.clone(),
            row.initrd.clone(),
            row.root.clone(),
            row.root_bytes,
            words,
        )
    };
    parts(one) == parts(other)
}

pub(super) fn describe(front: &Front, caller: &Caller, _: &DescribeImages) -> Answer<Images> {
    let rows = front.store.images(&caller.account_id).map_err(internal)?;
    Ok(Images { images: rows.into_iter().map(|row| row.image).collect() })
}

pub(super) fn deregister(front: &Front, caller: &Caller, request: &DeregisterImage) -> Answer<Done> {
    let found = front.store.find_image(&caller.account_id, &request.image).map_err(internal)?;
    let Some(row) = found else {
        if request.image.starts_with(ImageId::PREFIX) {
            request.image.parse::<ImageId>()?;
        }
        let shown: String = request.image.chars().take(140).collect();
        return Err(ApiError::new(ErrorCode::InvalidAmiIdNotFound, format!("there is no image {shown:?}")));
    };
    if row.image.owner != caller.account_id && !caller.admin {
        return Err(ApiError::new(
            ErrorCode::UnauthorizedOperation,
            format!(
                "image {} belongs to account {}: only that one or an administrator may withdraw it",
                row.image.image_id, row.image.owner
            ),
        ));
    }
    front.store.deregister_image(&row.image.image_id, front.clock.now()).map_err(internal)?;
    Ok(Done {})
}

/// Refuses a file that the caller has not uploaded: a file's hash proves no possession of the file.
fn check_blob(front: &Front, caller: &Caller, parameter: &str, id: &BlobId) -> Answer<()> {
    let owned = front.store.owns_blob(&caller.account_id, id).map_err(internal)?;
    if owned && front.blobs.size(id).is_some() {
        return Ok(());
    }
    let message = format!("{parameter} is blob {id}, which was not uploaded: PUT it to /v1/blobs/{id} first");
    Err(ApiError::new(ErrorCode::InvalidBlobNotFound, message))
}

/// The root disk's size decides the volumes' size and claim. A compressed file that states its
/// unpacked length must state the same size.
fn check_root_bytes(root: &Path, root_bytes: u64) -> Answer<()> {
    let mut header = Vec::new();
    let file = File::open(root).map_err(|error| {
        ApiError::new(ErrorCode::InternalError, format!("the uploaded root disk cannot be read: {error}"))
    })?;
    file.take(ZSTD_HEADER_BYTES).read_to_end(&mut header).map_err(|error| {
        ApiError::new(ErrorCode::InternalError, format!("the uploaded root disk cannot be read: {error}"))
    })?;
    match content_size(&header) {
        Some(size) if size != root_bytes => Err(ApiError::new(
            ErrorCode::InvalidParameterValue,
            format!(
                "root_bytes is {root_bytes}, and the root disk that was uploaded has {size} bytes unpacked"
            ),
        )),
        _ => Ok(()),
    }
}

/// The frame content size of a zstd frame (RFC 8878, 3.1.1.1), if its header has one.
fn content_size(header: &[u8]) -> Option<u64> {
    let descriptor = *header.get(4)?;
    let single_segment = descriptor & 0x20 != 0;
    let window = usize::from(!single_segment);
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let at = 5 + window + dictionary;
    let (length, added) = match descriptor >> 6 {
        0 if !single_segment => return None,
        0 => (1, 0),
        1 => (2, 256),
        2 => (4, 0),
        _ => (8, 0),
    };
    let mut bytes = [0; 8];
    bytes[..length].copy_from_slice(header.get(at..at + length)?);
    u64::from_le_bytes(bytes).checked_add(added)
}

/// An image is named by id or name: a name with the prefix of ids could never be used.
fn check_no_id(parameter: &str, name: &str) -> Answer<()> {
    if !name.starts_with(ImageId::PREFIX) {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    Err(ApiError::new(
        ErrorCode::InvalidParameterValue,
        format!(
            "{parameter} is {shown:?}, allowed is what does not begin with {:?}, as ids do",
            ImageId::PREFIX
        ),
    ))
}

/// A kernel command line: printable ASCII, as long as x86 kernels take.
fn check_boot_args(text: &str) -> Answer<()> {
    if text.len() <= 2047 && text.bytes().all(|b| (b' '..=b'~').contains(&b)) {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::InvalidParameterValue,
        format!("boot_args has {} bytes, allowed are at most 2047, all of them printable ASCII", text.len()),
    ))
}

fn check_user(name: &str) -> Answer<()> {
    let begins = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b == b'_');
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b);
    if begins && name.len() <= 32 && name.bytes().all(plain) {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    Err(ApiError::new(
        ErrorCode::InvalidParameterValue,
        format!(
            "default_user is {shown:?}, allowed is a login name: 1 to 32 characters of a-z 0-9 _ -, not beginning with a digit or -"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_disk_has_the_size_that_its_compressed_file_says() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("blob");
        let magic = [0x28, 0xb5, 0x2f, 0xfd];
        let frames: &[(&[u8], Option<u64>)] = &[
            (&[0x20, 200], Some(200)),
            (&[0x60, 44, 1], Some(556)),
            (&[0xa0, 0, 0, 16, 0], Some(1 << 20)),
            (&[0xc0, 0x58, 0, 0, 0, 64, 0, 0, 0, 0], Some(1 << 30)),
            (&[0x01 | 0x80, 0x58, 9, 0, 0, 16, 0], Some(1 << 20)),
            (&[0x00, 0x58], None),
            (&[0xc0, 0x58, 0], None),
            (&[], None),
        ];
        for (rest, size) in frames {
            let frame = [&magic, *rest].concat();
            assert_eq!(content_size(&frame), *size, "{rest:x?}");
            std::fs::write(&path, &frame).unwrap();
            assert!(check_root_bytes(&path, size.unwrap_or(7)).is_ok(), "{rest:x?}");
            let other = check_root_bytes(&path, 8);
            assert_eq!(other.is_ok(), size.is_none(), "{other:?}");
        }
    }

    #[test]
    fn login_names_and_command_lines_are_plain() {
        for good in ["root", "debian", "_a", "a-1"] {
            assert!(check_user(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "1a", "a b", "a;reboot", "Root", &"a".repeat(33)] {
            assert!(check_user(bad).is_err(), "{bad}");
        }
        assert!(check_no_id("name", "ami").is_ok() && check_no_id("name", "debian-ami-1").is_ok());
        assert!(check_no_id("name", "ami-web").is_err());
        assert!(check_boot_args("console=ttyS0 root=/dev/vda rw").is_ok());
        assert!(check_boot_args("a\nb").is_err());
        assert!(check_boot_args(&"a".repeat(2048)).is_err());
    }
}
