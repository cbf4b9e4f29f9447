//! `image`: what instances boot.

use super::manifest;
use crate::args::ImageCommand;
use crate::blob::{Packed, pack};
use crate::client::Client;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::output::{format, views};
use crate::progress;
use roost_types::api::{DeregisterImage, DescribeImages, GetCallerIdentity, RegisterImage};
use roost_types::{BlobId, ErrorCode};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// `image`.
pub async fn run(context: &Context, command: ImageCommand) -> Result<()> {
    match command {
        ImageCommand::Import { path, name, replace } => import(context, &path, name, replace).await,
        ImageCommand::Ls => {
            let images = context.client()?.call(&DescribeImages {}).await?;
            context.output.response(&images, || views::images(&images, context.now()))
        }
        ImageCommand::Rm { image } => {
            let done = context.client()?.call(&DeregisterImage { image: image.clone() }).await?;
            context
                .output
                .lines(&done, || format!("image {image} is withdrawn; instances made from it go on"))
        }
    }
}

async fn import(context: &Context, path: &Path, name: Option<String>, replace: bool) -> Result<()> {
    let manifest = manifest::read(path)?;
    let name = name.unwrap_or(manifest.name);
    let client = context.client()?;
    context.on_interrupt(
        "interrupted; what was uploaded stays, and the same command goes on from there. No image was made.",
    );
    // Before minutes of compression: is there a controller, and may we?
    client.call(&GetCallerIdentity {}).await?;

    let kernel = upload(context, &client, &manifest.kernel).await?.0;
    let initrd = match &manifest.initrd {
        Some(initrd) => Some(upload(context, &client, initrd).await?.0),
        None => None,
    };
    let (root, root_bytes) = upload(context, &client, &manifest.root).await?;
    let request = RegisterImage {
        name: name.clone(),
        description: manifest.description,
        kernel,
        initrd,
        root,
        root_bytes,
        boot_args: manifest.boot_args,
        default_user: manifest.default_user,
        ssh: manifest.ssh,
    };
    let mut registered = client.call(&request).await;
    // The same image again is the one that is there; only another one takes its place.
    if replace && registered.as_ref().is_err_and(|error| error.is_api(ErrorCode::InvalidAmiNameDuplicate)) {
        client.call(&DeregisterImage { image: name.clone() }).await?;
        registered = client.call(&request).await;
    }
    let image = registered.map_err(|error| {
        let advice = "give another --name, or take the old one's place with --replace";
        error.with_advice(ErrorCode::InvalidAmiNameDuplicate, advice)
    })?;
    context.output.lines(&image, || format!("{}  {}", image.image_id, image.name))
}

/// Compresses a file and uploads it unless it is there. The answer has its size before compression.
async fn upload(context: &Context, client: &Client, path: &Path) -> Result<(BlobId, u64)> {
    let shown =
        path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into());
    let packed = compress(context, path, &shown).await?;
    let (id, raw_length) = (packed.id.clone(), packed.raw_length);
    if client.has_blob(&id).await? {
        context.output.note(&format!("{shown}: there already"));
        return Ok((id, raw_length));
    }
    let bar = progress::bytes(context.global.quiet, &shown, packed.length);
    let reader = bar.wrap_async_read(tokio::fs::File::from_std(packed.file));
    client.put_blob(&id, packed.length, reader).await?;
    bar.finish_and_clear();
    context.output.note(&format!(
        "{shown}: uploaded {} ({} before compression)",
        format::bytes(packed.length),
        format::bytes(raw_length)
    ));
    Ok((id, raw_length))
}

async fn compress(context: &Context, path: &Path, shown: &str) -> Result<Packed> {
    /// Ends the work when nobody waits for it any more.
    struct Cancel(Arc<AtomicBool>);
    impl Drop for Cancel {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let length = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let bar = progress::bytes(context.global.quiet, &format!("compressing {shown}"), length);
    let cancelled = Arc::new(AtomicBool::new(false));
    let _cancel = Cancel(cancelled.clone());
    let (path, moving) = (path.to_owned(), bar.clone());
    let packed =
        tokio::task::spawn_blocking(move || pack(&path, &cancelled, |at| moving.set_position(at))).await;
    bar.finish_and_clear();
    packed.map_err(|error| Error::Internal(error.to_string()))?
}
