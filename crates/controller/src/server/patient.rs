//! A connection whose peer must keep reading: a write without progress for too long fails.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// Fewer bytes are no progress, unless the whole write was shorter.
const PROGRESS: usize = 16 * 1024;

/// Wraps a connection.
pub struct Patient<S> {
    inner: S,
    patience: Duration,
    /// Set: no limit applies.
    unlimited: Arc<AtomicBool>,
    /// Timer since the first write that had to wait.
    waiting: Option<Pin<Box<Sleep>>>,
    /// Bytes written since the timer started.
    written: usize,
}

impl<S> Patient<S> {
    /// Limits how long a write may wait while `unlimited` is not set.
    pub fn new(inner: S, patience: Duration, unlimited: Arc<AtomicBool>) -> Self {
        Self { inner, patience, unlimited, waiting: None, written: 0 }
    }

    /// Judges a write of `wanted` bytes by its result.
    fn judge(
        &mut self,
        wanted: usize,
        result: Poll<io::Result<usize>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(count)) = &result {
            self.written += count;
            if *count >= wanted || self.written >= PROGRESS {
                (self.waiting, self.written) = (None, 0);
            }
        }
        if result.is_ready() || self.unlimited.load(Ordering::Relaxed) {
            return result;
        }
        let patience = self.patience;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        ready!(waiting.as_mut().poll(context));
        let message = format!("the peer did not read for {} s", patience.as_secs_f32());
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(context, buffer);
        self.judge(buffer.len(), result, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wanted = buffers.iter().map(|buffer| buffer.len()).sum();
        let result = Pin::new(&mut self.inner).poll_write_vectored(context, buffers);
        self.judge(wanted, result, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const PATIENCE: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_read_is_given_up() {
        let (near, mut far) = tokio::io::duplex(1024);
        let mut near = Patient::new(near, PATIENCE, Arc::default());
        let reading = tokio::spawn(async move {
            // A single byte now and then is no progress.
            for _ in 0..100 {
                tokio::time::sleep(Duration::from_secs(10)).await;
                if far.read_u8().await.is_err() {
                    break;
                }
            }
        });
        let error = near.write_all(&[0; 4096]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(near);
        reading.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_peer_that_reads_gets_everything() {
        let (near, mut far) = tokio::io::duplex(PROGRESS);
        let mut near = Patient::new(near, PATIENCE, Arc::default());
        let reading = tokio::spawn(async move {
            let mut total = 0;
            let mut buffer = vec![0; PROGRESS];
            loop {
                tokio::time::sleep(Duration::from_secs(20)).await;
                match far.read(&mut buffer).await.unwrap() {
                    0 => return total,
                    count => total += count,
                }
            }
        });
        near.write_all(&vec![0; 20 * PROGRESS]).await.unwrap();
        drop(near);
        assert_eq!(reading.await.unwrap(), 20 * PROGRESS);
    }

    #[tokio::test(start_paused = true)]
    async fn a_streams_reader_may_pause() {
        let (near, mut far) = tokio::io::duplex(16);
        let mut near = Patient::new(near, PATIENCE, Arc::new(AtomicBool::new(true)));
        let writing = tokio::spawn(async move { near.write_all(&[0; 64]).await });
        tokio::time::sleep(10 * PATIENCE).await;
        let mut seen = [0; 64];
        far.read_exact(&mut seen).await.unwrap();
        writing.await.unwrap().unwrap();
    }
}
