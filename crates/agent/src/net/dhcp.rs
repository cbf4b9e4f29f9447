//! DHCP with one lease for one guest (RFC 2131, 2132, 3442). The guest is hostile: whatever it sends, it is answered
//! with its own one address or not at all.

use super::METADATA_ADDRESS;
use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Decodable, Decoder, Encodable};
use ipnet::Ipv4Net;
use std::net::{Ipv4Addr, SocketAddrV4};

/// Seconds that a lease holds; the address never changes, so this only says how often a guest asks again.
const LEASE_SECONDS: u32 = 3600;
/// Renewal time (RFC 2131's T1) in seconds: the longest that a guest keeps outdated name servers.
/// The lease itself outlasts an agent that is down.
const RENEW_SECONDS: u32 = 300;
/// Longest packet that is looked at.
pub const PACKET_MAX: usize = 1500;

/// The one lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// Its address.
    pub address: Ipv4Addr,
    /// Prefix length of its subnet.
    pub prefix_len: u8,
    /// The router, which is also this server.
    pub router: Ipv4Addr,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// Host name.
    pub hostname: String,
    /// Largest packet, bytes.
    pub mtu: u16,
}

/// An answer and where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The encoded message.
    pub bytes: Vec<u8>,
    /// The receiver.
    pub to: SocketAddrV4,
}

/// Answers a packet, or does not.
pub fn answer(lease: &Lease, packet: &[u8]) -> Option<Answer> {
    let request = Message::decode(&mut Decoder::new(&strip(packet)?)).ok()?;
    if request.opcode() != Opcode::BootRequest || request.chaddr() != lease.mac {
        return None;
    }
    let kind = match request.opts().msg_type()? {
        MessageType::Discover => MessageType::Offer,
        MessageType::Request => {
            if addressed_elsewhere(lease, &request) {
                return None;
            }
            if wanted(&request).is_some_and(|wanted| wanted != lease.address) {
                MessageType::Nak
            } else {
                MessageType::Ack
            }
        }
        MessageType::Inform => MessageType::Ack,
        _ => return None,
    };
    let inform = request.opts().has_msg_type(MessageType::Inform);
    let reply = reply(lease, &request, kind, inform);
    let mut bytes = reply.to_vec().ok()?;
    // BOOTP's least size, which old clients insist on (RFC 1542, 2.1).
    bytes.resize(bytes.len().max(300), 0);
    Some(Answer { bytes, to: SocketAddrV4::new(receiver(lease, &request, kind), 68) })
}

/// Keeps of a packet only what is looked at. The decoder knows some two hundred options and trusts the lengths of a
/// few (a one-byte `ClientNetworkInterface` trips an assertion of it); a guest gets to reach three of them.
fn strip(packet: &[u8]) -> Option<Vec<u8>> {
    let (head, mut options) = packet.split_at_checked(240)?;
    let ethernet = head[1] == 1 && head[2] == 6;
    if !ethernet || head[236..] != [99, 130, 83, 99] {
        return None;
    }
    let mut kept = head.to_vec();
    // Server name and boot file, which may hold more options (option 52), are none of ours.
    kept[44..236].fill(0);
    while let Some((&code, rest)) = options.split_first() {
        if code == 255 {
            break;
        }
        if code == 0 {
            options = rest;
            continue;
        }
        let (&length, rest) = rest.split_first()?;
        let (value, rest) = rest.split_at_checked(usize::from(length))?;
        // Message type; requested address; server identifier.
        if matches!((code, length), (53, 1) | (50 | 54, 4)) {
            kept.extend([code, length]);
            kept.extend(value);
        }
        options = rest;
    }
    kept.push(255);
    Some(kept)
}

fn addressed_elsewhere(lease: &Lease, request: &Message) -> bool {
    matches!(request.opts().get(OptionCode::ServerIdentifier),
        Some(DhcpOption::ServerIdentifier(server)) if *server != lease.router)
}

/// The address that the client asks to have or to keep.
fn wanted(request: &Message) -> Option<Ipv4Addr> {
    match request.opts().get(OptionCode::RequestedIpAddress) {
        Some(DhcpOption::RequestedIpAddress(address)) => Some(*address),
        _ => Some(request.ciaddr()).filter(|address| !address.is_unspecified()),
    }
}

/// RFC 2131, 4.1: to the client's address if it has one, else as a broadcast if it asks for that (a refusal always),
/// else to the address that it gets; its hardware address is known to the kernel for good.
fn receiver(lease: &Lease, request: &Message, kind: MessageType) -> Ipv4Addr {
    let has_ours = request.ciaddr() == lease.address;
    if kind == MessageType::Nak || (!has_ours && request.flags().broadcast()) {
        Ipv4Addr::BROADCAST
    } else {
        lease.address
    }
}

fn reply(lease: &Lease, request: &Message, kind: MessageType, inform: bool) -> Message {
    let mut reply = Message::default();
    reply
        .set_opcode(Opcode::BootReply)
        .set_xid(request.xid())
        .set_flags(if kind == MessageType::Nak { Flags::default().set_broadcast() } else { request.flags() })
        .set_giaddr(request.giaddr())
        .set_chaddr(&lease.mac);
    if kind != MessageType::Nak {
        reply.set_ciaddr(if kind == MessageType::Ack { request.ciaddr() } else { Ipv4Addr::UNSPECIFIED });
        reply.set_siaddr(lease.router);
        if !inform {
            reply.set_yiaddr(lease.address);
        }
    }
    let options = reply.opts_mut();
    options.insert(DhcpOption::MessageType(kind));
    options.insert(DhcpOption::ServerIdentifier(lease.router));
    if kind == MessageType::Nak {
        return reply;
    }
    if !inform {
        options.insert(DhcpOption::AddressLeaseTime(LEASE_SECONDS));
        options.insert(DhcpOption::Renewal(RENEW_SECONDS));
    }
    let subnet =
        Ipv4Net::new(lease.address, lease.prefix_len).map_or(Ipv4Addr::BROADCAST, |net| net.netmask());
    options.insert(DhcpOption::SubnetMask(subnet));
    options.insert(DhcpOption::Router(vec![lease.router]));
    if !lease.dns.is_empty() {
        options.insert(DhcpOption::DomainNameServer(lease.dns.clone()));
    }
    options.insert(DhcpOption::Hostname(lease.hostname.clone()));
    options.insert(DhcpOption::InterfaceMtu(lease.mtu));
    // RFC 3442: who takes this option ignores the router option, so the default route is in here as well. The
    // metadata service is on the wire itself: it must be found before, and without, any route.
    options.insert(DhcpOption::ClasslessStaticRoute(
        [(METADATA_ADDRESS, 32, Ipv4Addr::UNSPECIFIED), (Ipv4Addr::UNSPECIFIED, 0, lease.router)]
            .into_iter()
            .filter_map(|(to, prefix, via)| Some((Ipv4Net::new(to, prefix).ok()?, via)))
            .collect(),
    ));
    reply
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lease() -> Lease {
        Lease {
            mac: [6, 0, 10, 0, 0, 5],
            address: Ipv4Addr::new(172, 31, 0, 5),
            prefix_len: 20,
            router: Ipv4Addr::new(172, 31, 0, 1),
            dns: vec![Ipv4Addr::new(9, 9, 9, 9)],
            hostname: "web".into(),
            mtu: 1450,
        }
    }

    fn request(kind: MessageType, change: impl FnOnce(&mut Message)) -> Vec<u8> {
        let mut message = Message::default();
        message.set_opcode(Opcode::BootRequest).set_chaddr(&lease().mac).set_xid(77);
        message.opts_mut().insert(DhcpOption::MessageType(kind));
        change(&mut message);
        message.to_vec().unwrap()
    }

    fn parse(answer: &Answer) -> Message {
        Message::decode(&mut Decoder::new(&answer.bytes)).unwrap()
    }

    #[test]
    fn a_discover_is_offered_the_one_address_and_all_it_needs() {
        let answer = answer(&lease(), &request(MessageType::Discover, |_| ())).unwrap();
        assert_eq!(answer.to, "172.31.0.5:68".parse().unwrap());
        let offer = parse(&answer);
        assert_eq!((offer.yiaddr(), offer.xid()), (lease().address, 77));
        let options = offer.opts();
        assert!(options.has_msg_type(MessageType::Offer));
        let get = |code| options.get(code).cloned();
        assert_eq!(
            get(OptionCode::SubnetMask),
            Some(DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 240, 0)))
        );
        assert_eq!(
            get(OptionCode::Renewal),
            Some(DhcpOption::Renewal(300)),
            "other name servers are heard of"
        );
        assert_eq!(get(OptionCode::InterfaceMtu), Some(DhcpOption::InterfaceMtu(1450)));
        assert_eq!(get(OptionCode::Hostname), Some(DhcpOption::Hostname("web".into())));
        let Some(DhcpOption::ClasslessStaticRoute(routes)) = get(OptionCode::ClasslessStaticRoute) else {
            panic!("no routes")
        };
        assert_eq!(routes.len(), 2);
        assert_eq!(routes[0].0.addr(), METADATA_ADDRESS);
    }

    #[test]
    fn a_broadcast_flag_is_honoured() {
        let bytes = request(MessageType::Discover, |m| {
            m.set_flags(Flags::default().set_broadcast());
        });
        assert_eq!(answer(&lease(), &bytes).unwrap().to, "255.255.255.255:68".parse().unwrap());
    }

    #[test]
    fn a_request_for_another_address_is_refused() {
        let other = request(MessageType::Request, |m| {
            m.opts_mut().insert(DhcpOption::RequestedIpAddress(Ipv4Addr::new(172, 31, 0, 6)));
        });
        let refused = answer(&lease(), &other).unwrap();
        assert!(parse(&refused).opts().has_msg_type(MessageType::Nak));
        let own = request(MessageType::Request, |m| {
            m.opts_mut().insert(DhcpOption::RequestedIpAddress(lease().address));
        });
        assert!(parse(&answer(&lease(), &own).unwrap()).opts().has_msg_type(MessageType::Ack));
    }

    #[test]
    fn another_servers_client_and_another_hardware_address_get_no_answer() {
        let elsewhere = request(MessageType::Request, |m| {
            m.opts_mut().insert(DhcpOption::ServerIdentifier(Ipv4Addr::new(1, 2, 3, 4)));
        });
        assert_eq!(answer(&lease(), &elsewhere), None);
        let stranger = request(MessageType::Discover, |m| {
            m.set_chaddr(&[6, 6, 6, 6, 6, 6]);
        });
        assert_eq!(answer(&lease(), &stranger), None);
    }

    #[test]
    fn options_that_trip_the_decoder_are_not_shown_to_it() {
        // ClientNetworkInterface and BulkLeaseQueryStatusCode, one byte and none instead of three and one.
        for hostile in [&[94, 1, 0][..], &[151, 0], &[53, 0], &[81, 255]] {
            let mut packet = request(MessageType::Discover, |_| ());
            let end = packet.pop();
            packet.extend(hostile);
            packet.extend(end);
            let _ = answer(&lease(), &packet);
        }
    }

    proptest! {
        #[test]
        fn hostile_packets_are_survived(mut bytes in proptest::collection::vec(any::<u8>(), 0..700), cut in 0_usize..700) {
            let _ = answer(&lease(), &bytes);
            let mut good = request(MessageType::Discover, |_| ());
            bytes.truncate(good.len());
            let at = cut.min(good.len());
            good.truncate(at);
            good.extend(bytes);
            if let Some(answer) = answer(&lease(), &good) {
                prop_assert!(answer.to.port() == 68 && answer.bytes.len() < PACKET_MAX);
            }
        }
    }
}
