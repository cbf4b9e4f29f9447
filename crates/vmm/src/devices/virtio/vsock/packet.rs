//! The header of a packet (virtio 1.2, 5.10.6).
//!
//! The layout is the virtio-vsock crate's. How a packet is cut into descriptors is the queue's matter (2.7.4.2: no device may
//! depend on it): a header is copied in one piece before anybody looks at it.

use virtio_vsock::packet::{PKT_HEADER_SIZE, VsockPacket};

/// Bytes of a header.
pub const HEADER: usize = PKT_HEADER_SIZE;
/// The host's context id.
pub const HOST_CID: u64 = 2;
/// The only type of socket that is offered.
pub const STREAM: u16 = 1;
/// The sender of a SHUTDOWN receives no more.
pub const NO_MORE_RECEIVED: u32 = 1;
/// The sender of a SHUTDOWN sends no more.
pub const NO_MORE_SENT: u32 = 2;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts it.
    Response = 2,
    /// Refuses or ends it at once.
    Reset = 3,
    /// Ends one direction or both.
    Shutdown = 4,
    /// Carries bytes.
    Data = 5,
    /// Says how much room there is.
    CreditUpdate = 6,
    /// Asks how much room there is.
    CreditRequest = 7,
}

impl Op {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Reset,
        Self::Shutdown,
        Self::Data,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];
}

/// A header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // The specification's names.
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    #[must_use]
    pub fn parse(bytes: [u8; HEADER]) -> Option<Self> {
        let mut room = [0; HEADER];
        let mut packet = packet(&mut room)?;
        packet.set_header_from_raw(&bytes).ok()?;
        Some(Self {
            src_cid: packet.src_cid(),
            dst_cid: packet.dst_cid(),
            src_port: packet.src_port(),
            dst_port: packet.dst_port(),
            len: packet.len(),
            kind: packet.type_(),
            op: packet.op(),
            flags: packet.flags(),
            buf_alloc: packet.buf_alloc(),
            fwd_cnt: packet.fwd_cnt(),
        })
    }

    /// The header as it is sent.
    #[must_use]
    pub fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        if let Some(mut packet) = packet(&mut bytes) {
            packet
                .set_src_cid(self.src_cid)
                .set_dst_cid(self.dst_cid)
                .set_src_port(self.src_port)
                .set_dst_port(self.dst_port)
                .set_len(self.len)
                .set_type(self.kind)
                .set_op(self.op)
                .set_flags(self.flags)
                .set_buf_alloc(self.buf_alloc)
                .set_fwd_cnt(self.fwd_cnt);
        }
        bytes
    }

    /// What the packet is for; nothing that this device knows: `None`.
    #[must_use]
    pub fn op(&self) -> Option<Op> {
        Op::ALL.into_iter().find(|op| *op as u16 == self.op && self.kind == STREAM)
    }
}

/// The crate's view of a header's bytes; never `None`, as the length is right.
fn packet(bytes: &mut [u8; HEADER]) -> Option<VsockPacket<'_, ()>> {
    // SAFETY: the bytes are borrowed for as long as the packet lives, and nobody else has them meanwhile.
    unsafe { VsockPacket::new(bytes, None) }.ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: HOST_CID,
            src_port: 0x1122_3344,
            dst_port: 52,
            len: 5,
            kind: STREAM,
            op: Op::Data as u16,
            flags: 3,
            buf_alloc: 0x1_0000,
            fwd_cnt: 9,
        };
        let mut expected =
            vec![8, 7, 6, 5, 4, 3, 2, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0x44, 0x33, 0x22, 0x11, 52, 0, 0, 0];
        expected.extend([5, 0, 0, 0, 1, 0, 5, 0, 3, 0, 0, 0, 0, 0, 1, 0, 9, 0, 0, 0]);
        assert_eq!(header.bytes().to_vec(), expected);
        assert_eq!(header.op(), Some(Op::Data));
        assert_eq!(Header { kind: 2, ..header }.op(), None);
        assert_eq!(Header { op: 8, ..header }.op(), None);
        assert_eq!(Header { op: 0, ..header }.op(), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_and_back(bytes in any::<[u8; 32]>(), rest in any::<[u8; HEADER - 32]>()) {
            let mut all = [0; HEADER];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&rest);
            prop_assert_eq!(Header::parse(all).unwrap().bytes(), all);
        }
    }
}
