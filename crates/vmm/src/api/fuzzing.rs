//! For the fuzz targets: a server without a socket whose machine is being configured.

use std::collections::HashMap;

use vmm_sys_util::epoll::Epoll;

use super::http::{Request, Response};
use super::{Machine, Server};
use crate::config::VmConfig;
use crate::descriptors::Descriptors;
use crate::preboot::Preboot;
use crate::status::StatusWriter;

impl Server {
    /// Listens to nobody, and to no signal: a fuzzer has its own ways to end.
    ///
    /// # Panics
    /// The host gives no descriptors.
    #[allow(clippy::expect_used, reason = "for fuzz targets only")]
    #[must_use]
    pub fn unstarted(id: &str) -> Self {
        let nothing = std::fs::File::open("/dev/null").expect("/dev/null opens");
        Self {
            epoll: Epoll::new().expect("epoll_create"),
            listener: None,
            signals: nothing.into(),
            connections: HashMap::new(),
            id: id.to_owned(),
            resume_due: false,
            outputs: super::outputs::Outputs::new().expect("a timer"),
            machine: Some(Machine::Preboot(Preboot::new(VmConfig::default(), Descriptors::default()))),
        }
    }

    /// Answers one request.
    pub fn ask(&mut self, request: &Request<'_>) -> Response {
        self.handle(request, None, &mut StatusWriter::default()).0
    }
}
