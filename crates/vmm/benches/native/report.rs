//! Figures, their goals, and the table.

use std::fmt;

use serde_json::{Value, json};

/// Whose figure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Ours.
    Roost,
    /// QEMU's `-M microvm`.
    Qemu,
}

/// What was measured, for each monitor.
#[derive(Debug, Default)]
pub struct Sample {
    roost: Vec<f64>,
    qemu: Vec<f64>,
}

impl Sample {
    /// One more.
    pub fn add(&mut self, who: Who, value: f64) {
        match who {
            Who::Roost => self.roost.push(value),
            Who::Qemu => self.qemu.push(value),
        }
    }

    /// Whether there is anything.
    #[allow(dead_code, reason = "the native benchmark always has some")]
    pub const fn any(&self) -> bool {
        !self.roost.is_empty() || !self.qemu.is_empty()
    }

    fn sorted(&self, who: Who) -> Vec<f64> {
        let mut values = if who == Who::Roost { self.roost.clone() } else { self.qemu.clone() };
        values.sort_by(f64::total_cmp);
        values
    }

    /// The middle one; of an even number the mean of the two in the middle.
    pub fn median(&self, who: Who) -> f64 {
        let values = self.sorted(who);
        match values.len() {
            0 => f64::NAN,
            n if n % 2 == 1 => values[n / 2],
            n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
        }
    }

    fn least(&self, who: Who) -> f64 {
        self.sorted(who).first().copied().unwrap_or(f64::NAN)
    }
}

/// What a median must be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Goal {
    most: Option<f64>,
    ratio_most: Option<f64>,
    ratio_least: Option<f64>,
}

impl Goal {
    /// At most this.
    pub fn below(most: f64) -> Self {
        Self { most: Some(most), ..Self::default() }
    }

    /// At most this part of QEMU's.
    pub fn and_ratio(self, most: f64) -> Self {
        Self { ratio_most: Some(most), ..self }
    }

    /// At least this many times QEMU's.
    pub fn and_ratio_at_least(self, least: f64) -> Self {
        Self { ratio_least: Some(least), ..self }
    }

    /// Without QEMU, what is said about it cannot be judged.
    fn met(self, value: f64, ratio: f64) -> bool {
        self.most.is_none_or(|most| value <= most)
            && (ratio.is_nan() || self.ratio_most.is_none_or(|most| ratio <= most))
            && (ratio.is_nan() || self.ratio_least.is_none_or(|least| ratio >= least))
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            self.most.map(|most| format!("≤ {}", number(most))),
            self.ratio_most.map(|most| format!("≤ {most} × QEMU")),
            self.ratio_least.map(|least| format!("≥ {least} × QEMU")),
        ];
        formatter.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

struct Row {
    what: String,
    unit: &'static str,
    ours: (f64, f64),
    theirs: (f64, f64),
    goal: Goal,
}

impl Row {
    fn ratio(&self) -> f64 {
        self.ours.1 / self.theirs.1
    }

    fn met(&self) -> bool {
        self.goal.met(self.ours.1, self.ratio())
    }
}

/// All figures of one run.
pub struct Report {
    about: Vec<(&'static str, String)>,
    rows: Vec<Row>,
    calls: Vec<(String, f64, f64)>,
}

/// The load averages as the kernel gives them.
pub fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

impl Report {
    /// Begins with what the figures depend on.
    pub const fn new(about: Vec<(&'static str, String)>) -> Self {
        Self { about, rows: Vec::new(), calls: Vec::new() }
    }

    /// A row.
    pub fn compare(&mut self, what: &str, unit: &'static str, sample: &Sample, goal: Goal) {
        let pair = |who| (sample.least(who), sample.median(who));
        let row = Row { what: what.to_owned(), unit, ours: pair(Who::Roost), theirs: pair(Who::Qemu), goal };
        eprintln!("{}: {}", row.what, figures(row.ours));
        self.rows.push(row);
    }

    /// Each kind of API call.
    pub fn calls(&mut self, calls: &[(String, Sample)]) {
        let line = |(name, sample): &(String, Sample)| {
            (name.clone(), sample.least(Who::Roost), sample.median(Who::Roost))
        };
        self.calls = calls.iter().map(line).collect();
    }

    /// Ends with what the figures may have suffered from.
    pub fn finish(&mut self) {
        self.about.push(("load after", load()));
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let known = |value: f64| if value.is_nan() { Value::Null } else { json!(value) };
        let rows = self.rows.iter().map(|row| {
            json!({
                "what": row.what,
                "unit": row.unit,
                "roost": { "min": known(row.ours.0), "median": known(row.ours.1) },
                "qemu": { "min": known(row.theirs.0), "median": known(row.theirs.1) },
                "ratio": known(row.ratio()),
                "goal": row.goal.to_string(),
                "met": row.met(),
            })
        });
        let calls = self
            .calls
            .iter()
            .map(|(name, least, median)| json!({ "call": name, "min_ms": least, "median_ms": median }));
        let about: serde_json::Map<_, _> =
            self.about.iter().map(|(name, text)| ((*name).to_owned(), json!(text))).collect();
        json!({ "about": about, "rows": rows.collect::<Vec<_>>(), "calls": calls.collect::<Vec<_>>() })
    }
}

/// Three significant digits are what the figures are worth.
fn number(value: f64) -> String {
    match value {
        value if value.is_nan() => "–".to_owned(),
        value if value >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

fn figures((least, median): (f64, f64)) -> String {
    if least == median { number(median) } else { format!("{} / {}", number(least), number(median)) }
}

/// Markdown, as `docs/performance.md` holds it.
impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, text) in &self.about {
            writeln!(formatter, "- {name}: {text}")?;
        }
        writeln!(formatter, "\n| what | unit | Roost | QEMU microvm | ratio | goal | met |")?;
        writeln!(formatter, "|---|---|---|---|---|---|---|")?;
        for row in &self.rows {
            let (ours, theirs) =
                (figures(row.ours), if row.theirs.1.is_nan() { "–".into() } else { figures(row.theirs) });
            let met = match row.goal.to_string().as_str() {
                "" => "–",
                _ if row.met() => "yes",
                _ => "**no**",
            };
            writeln!(
                formatter,
                "| {} | {} | {ours} | {theirs} | {} | {} | {met} |",
                row.what,
                row.unit,
                number(row.ratio()),
                row.goal
            )?;
        }
        if !self.calls.is_empty() {
            writeln!(formatter, "\n| API call | ms |\n|---|---|")?;
        }
        for (name, least, median) in &self.calls {
            writeln!(formatter, "| `{name}` | {} |", figures((*least, *median)))?;
        }
        Ok(())
    }
}
