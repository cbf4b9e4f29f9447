//! Where the monitor's own lines go: the log and the metrics.

use vmm_sys_util::timerfd::TimerFd;

use super::{Machine, Server};
use crate::config::{LoggerConfig, MetricsConfig};
use crate::descriptors::Descriptors;
use crate::error::{Error, Result};
use crate::log;
use crate::metrics::{MetricsWriter, PERIOD};

/// The metrics' file, and when the next line is due.
pub(super) struct Outputs {
    metrics: Option<MetricsWriter>,
    pub(super) timer: TimerFd,
}

impl Outputs {
    pub(super) fn new() -> Result<Self> {
        let timer = crate::devices::virtio::pace::timer().map_err(Error::io("the metrics' timer"))?;
        Ok(Self { metrics: None, timer })
    }
}

/// Lets lines go where this says.
///
/// # Errors
/// [`Error::Open`], [`Error::NotHanded`], [`Error::Config`] for a descriptor that cannot be written.
pub fn set_log(config: LoggerConfig, descriptors: &Descriptors) -> Result<()> {
    let path = config.log_path.as_deref();
    let file = path.map(|path| descriptors.output(path, "log")).transpose()?;
    log::configure(config, file);
    Ok(())
}

impl Server {
    fn machine(&mut self) -> Result<&mut Machine> {
        self.machine.as_mut().ok_or_else(|| Error::State("there is no machine".into()))
    }

    /// Changes the log, at any time.
    pub(super) fn set_logger(&mut self, change: LoggerConfig) -> Result<()> {
        let machine = self.machine()?;
        let config = machine.config().logger.clone().unwrap_or_default().with(change.clone());
        // What is open already is not opened once more: the path may be out of reach now.
        let path = change.log_path;
        let file = path.map(|path| machine.descriptors().output(&path, "log")).transpose()?;
        machine.config_mut().logger = Some(config.clone());
        log::configure(config, file);
        Ok(())
    }

    /// Lets metrics go to a file, at any time.
    pub(super) fn set_metrics(&mut self, config: MetricsConfig) -> Result<()> {
        let machine = self.machine()?;
        let file = machine.descriptors().output(&config.metrics_path, "metrics")?;
        machine.config_mut().metrics = Some(config);
        self.outputs.metrics = Some(MetricsWriter::new(file));
        self.begin_metrics();
        Ok(())
    }

    /// Opens what the configuration names, before the build.
    ///
    /// # Errors
    /// As [`set_log`].
    pub fn open_metrics(&mut self, config: Option<&MetricsConfig>, descriptors: &Descriptors) -> Result<()> {
        if let Some(config) = config {
            let file = descriptors.output(&config.metrics_path, "metrics")?;
            self.outputs.metrics = Some(MetricsWriter::new(file));
        }
        Ok(())
    }

    /// A machine that has been started writes its first line at once, then one in each period.
    pub(super) fn begin_metrics(&mut self) {
        if self.outputs.metrics.is_some() && matches!(self.machine, Some(Machine::Running(_))) {
            if let Err(error) = self.outputs.timer.reset(PERIOD, Some(PERIOD)) {
                log::line(&format!(
                    "metrics are written on request only, as their timer cannot be set: {error}"
                ));
            }
            self.write_metrics();
        }
    }

    /// Writes a line that nobody asked for. What is missed is counted.
    pub(super) fn write_metrics(&mut self) {
        if self.outputs.metrics.is_some() {
            let _ = self.flush_metrics();
        }
    }

    /// Writes a line.
    pub(super) fn flush_metrics(&mut self) -> Result<()> {
        let metrics = self.metrics()?;
        let writer = self.outputs.metrics.as_mut().ok_or_else(|| {
            Error::State("metrics go nowhere: name a file or pipe first (PUT /metrics)".into())
        })?;
        writer.write(&metrics).map_err(Error::io("writing a line of metrics, which is missed"))
    }
}
