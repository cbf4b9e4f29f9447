//! What ran, by the agent's own record and by when things were done; and the usage log beside it.

use roost_e2e::Rig;
use serde_json::Value;
use std::collections::BTreeMap;

/// How far the log may be from the agent's record, in microseconds: the flight of a report. It carries ages, so what it
/// takes on the way (a new TLS connection after a kill, on an emulated CPU) is not known to the controller.
const FLIGHT: i64 = 2_000_000;

/// Microseconds since 1970 by the host's clock.
pub type Moment = i64;

/// One start of the instance.
#[derive(Debug, Default, Clone)]
struct Span {
    open: Option<Moment>,
    /// Earliest and latest end that may be billed.
    close: Option<(Moment, Moment)>,
}

/// What ought to be billed for one instance.
#[derive(Debug, Default)]
pub struct Books {
    spans: BTreeMap<u64, Span>,
}

/// The agent's record of the incarnation at hand.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// When this was read.
    pub now: Moment,
    pub incarnation: u64,
    pub began: Option<Moment>,
    pub ended: Option<Moment>,
    /// The process of the monitor that it may let run.
    pub monitor: Option<i64>,
}

/// Reads the agent's record of an instance; its times are CLOCK_BOOTTIME, which is told as the host's clock.
pub fn record(rig: &Rig, id: &str) -> Record {
    let text = rig
        .host(&format!(
            "date +%s%N; cut -d' ' -f1 /proc/uptime; cat {}/agent/instances/{id}/run.json 2>/dev/null || echo null",
            rig.state.display()
        ))
        .ok();
    let mut lines = text.splitn(3, '\n');
    let nanos: i64 = lines.next().unwrap().trim().parse().unwrap();
    let up: f64 = lines.next().unwrap().trim().parse().unwrap();
    #[expect(clippy::cast_possible_truncation, reason = "seconds since boot")]
    let booted = nanos / 1000 - (up * 1e6) as i64;
    let run: Value = serde_json::from_str(lines.next().unwrap()).unwrap();
    let at = |value: &Value| value.as_i64().map(|ns| booted + ns / 1000);
    Record {
        now: nanos / 1000,
        incarnation: run["incarnation"].as_u64().unwrap_or(0),
        began: at(&run["began_ns"]),
        ended: at(&run["ended"]["at_ns"]),
        monitor: run["monitor"]["pid"].as_i64(),
    }
}

impl Books {
    /// Notes when the incarnation at hand began, if it did.
    pub fn begin(&mut self, record: &Record) {
        if record.began.is_some() {
            self.spans.entry(record.incarnation).or_default().open = record.began;
        }
    }

    /// Notes between which moments the run of an incarnation may end on the bill; the first word counts.
    pub fn end(&mut self, incarnation: u64, earliest: Moment, latest: Moment) {
        self.spans.entry(incarnation).or_default().close.get_or_insert((earliest, latest));
    }

    /// Compares with the usage log and with what the owner is shown; gives the bill in words.
    pub fn check(&self, rig: &Rig, instance: &Value) -> Result<String, String> {
        let id = instance["instance_id"].as_str().unwrap_or_default();
        let log = rig
            .host(&format!(
                "setpriv --reuid=roost --regid=roost --clear-groups {}/roost-controller usage-log export --state-dir {}/controller",
                rig.host_bin.display(),
                rig.state.display()
            ))
            .ok();
        let mut intervals: BTreeMap<u64, (Option<Moment>, Option<Moment>)> = BTreeMap::new();
        for line in log.lines().filter(|line| line.contains(id)) {
            let event: Value = serde_json::from_str(line).map_err(|error| format!("{line}: {error}"))?;
            let interval = intervals.entry(event["incarnation"].as_u64().unwrap()).or_default();
            let side = if event["kind"] == "open" { &mut interval.0 } else { &mut interval.1 };
            if side.replace(event["at"].as_i64().unwrap()).is_some() {
                return Err(format!("billed twice: {log}"));
            }
        }
        let ran: Vec<u64> = self.spans.keys().copied().collect();
        let billed: Vec<u64> = intervals.keys().copied().collect();
        if ran != billed {
            return Err(format!("starts {ran:?} ran, starts {billed:?} are billed"));
        }
        let (mut used, mut charged, mut last_end) = (0, 0, 0);
        for (number, span) in &self.spans {
            let (Some(open), Some(close)) = intervals[number] else {
                return Err(format!("start {number} is still open: {intervals:?}"));
            };
            let began = span.open.ok_or(format!("nobody saw start {number} begin"))?;
            let (earliest, latest) = span.close.ok_or(format!("nobody ended start {number}"))?;
            if (open - began).abs() > FLIGHT {
                return Err(format!("start {number} began at {began} and is billed from {open}"));
            }
            // Nothing is billed before it began, however early its end was asked for.
            let (earliest, latest) = (earliest.max(open), latest.max(open));
            if !(earliest - FLIGHT..=latest + FLIGHT).contains(&close) {
                return Err(format!(
                    "start {number} is billed to {close}, allowed is {earliest} to {latest}"
                ));
            }
            if open < last_end {
                return Err(format!("start {number} overlaps the one before: {intervals:?}"));
            }
            last_end = close;
            let seconds = (close - open + 999_999) / 1_000_000;
            used += seconds;
            charged += seconds.max(60);
        }
        let shown = (instance["used_seconds"].as_i64(), instance["billed_seconds"].as_i64());
        if shown != (Some(used), Some(charged)) {
            return Err(format!("used and billed are {used} and {charged} by the log, shown are {shown:?}"));
        }
        Ok(format!("{} starts, {used} s used, {charged} s billed", self.spans.len()))
    }
}
