//! Usage events, and when a run ended.

use super::draft::View;
use roost_store::{InstanceRow, Seen, VolumeRow};
use roost_types::Micros;
use roost_types::metering::{Meter, UsageEvent, UsageKind};

/// Sequence number of the event that opens a volume's interval.
const OPEN: u64 = 0;
/// Sequence number of the event that closes it.
const CLOSE: u64 = 1;

fn instance_event(row: &InstanceRow, kind: UsageKind, sequence: u64, at: Micros) -> UsageEvent {
    UsageEvent {
        account: row.account_id.clone(),
        resource: row.instance_id.to_string(),
        meter: Meter::InstanceSeconds,
        incarnation: row.incarnation,
        sequence,
        kind,
        at,
        sku: row.instance_type.name.clone(),
        quantity: 1,
        continues: kind == UsageKind::Open && (row.continues || row.segment > 0),
    }
}

/// The virtual CPUs of this incarnation began to run, or its next part begins.
pub fn open_instance(row: &InstanceRow, at: Micros) -> UsageEvent {
    instance_event(row, UsageKind::Open, row.segment, at)
}

/// The virtual CPUs stopped, or the part ends.
pub fn close_instance(row: &InstanceRow, at: Micros) -> UsageEvent {
    instance_event(row, UsageKind::Close, row.segment + 1, at)
}

fn volume_event(volume: &VolumeRow, kind: UsageKind, sequence: u64, at: Micros) -> UsageEvent {
    UsageEvent {
        account: volume.account_id.clone(),
        resource: volume.volume_id.to_string(),
        meter: Meter::VolumeGibSeconds,
        incarnation: 1,
        sequence,
        kind,
        at,
        sku: volume.volume_type.clone(),
        quantity: volume.size_gib,
        continues: false,
    }
}

/// The volume exists on its host.
pub fn open_volume(volume: &VolumeRow, at: Micros) -> UsageEvent {
    volume_event(volume, UsageKind::Open, OPEN, at)
}

/// Its removal was accepted.
pub fn close_volume(volume: &VolumeRow, at: Micros) -> UsageEvent {
    volume_event(volume, UsageKind::Close, CLOSE, at)
}

/// Returns the end of the run that opened at `open`, from the best of these sources:
/// 1. the end that the agent saw, or that the monitor itself wrote down, but never before our last
///    proof of life;
/// 2. the last moment at which an agent saw it alive: the agent's own durable word or our last proof, the later;
/// 3. nobody dated the end, but it was asked for and the agent had reported shortly before: the asked-for end.
///
/// Never after the asked-for end, never before `open` or what is sealed. After a reboot of the host
/// only proofs count: ages of another boot mean nothing.
pub fn end_of_run(row: &InstanceRow, seen: Option<&Seen>, view: &View, open: Micros) -> Micros {
    let seen = seen.filter(|seen| {
        seen.incarnation == row.incarnation && row.boot_id.as_ref().is_none_or(|boot| *boot == seen.boot_id)
    });
    let proof = view.proof.unwrap_or(open).max(open);
    let end = match seen.map(|seen| (seen.run_ended, seen.last_seen)) {
        Some((Some(ended), _)) => ended.max(proof),
        Some((None, Some(last))) => last.max(proof),
        Some((None, None)) => match row.bill_until {
            Some(asked) if asked - proof <= view.recent => asked,
            _ => proof,
        },
        None => proof,
    };
    let end = row.bill_until.map_or(end, |asked| end.min(asked));
    // Usage that was proved before the seal is charged already.
    end.max(open).max(view.sealed.min(proof))
}
