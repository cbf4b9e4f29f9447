//! `doctor`: whether this machine can run instances, and how to mend what is missing. Needs no controller.
//!
//! ```text
//! gather (looks, runs the probe guest) ──→ Findings ──┬─→ decision (pure) ──→ exit code
//!                                                     └─→ report   (pure) ──→ findings with fixes
//! ```

mod decision;
mod gather;
mod probe;
mod report;
mod side_channels;

use crate::args::DoctorArgs;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::exit;
use crate::output::{Table, Tone};
use decision::{Decision, decide};
use report::{Check, MAIN};
use serde_json::json;

/// `doctor`.
pub async fn run(context: &Context, args: &DoctorArgs) -> Result<()> {
    let mut progress = context.progress();
    progress.set("looking at this machine");
    let (findings, remedies) = gather::gather(args).await;
    progress.finish();
    let decision = decide(&findings);
    let checks = report::checks(&findings, &remedies);
    let (name, why, code) = match &decision {
        Decision::BareHost => ("bare-host", "", exit::OK),
        Decision::VirtualHost(why) => ("virtual-host", why.as_str(), exit::DOCTOR_VIRTUAL_HOST),
        Decision::Refuse(why) => ("refuse", why.as_str(), exit::DOCTOR_REFUSE),
    };
    if context.json() {
        context.output.json(&json!({ "decision": name, "why": why, "findings": checks }))?;
    } else {
        context.output.response(&(), || table(&checks))?;
        context.output.write(&crate::harmless::lines(&summary(&checks, &decision)))?;
    }
    if code == exit::OK { Ok(()) } else { Err(Error::Exit(code)) }
}

fn table(checks: &[Check]) -> Table {
    let mut table = Table::new("").text("CHECK", 0).text("", 0).text("FOUND", 0);
    let mut section = MAIN;
    for check in checks {
        if check.section != section {
            section = check.section;
            table.row([format!("{section}:"), String::new(), String::new()]);
        }
        let mark = if check.ok { ("ok", Tone::Good) } else { ("no", Tone::Bad) };
        let plain = |text: &str| (text.to_owned(), Tone::Plain);
        table.toned([plain(check.check), (mark.0.to_owned(), mark.1), plain(&check.detail)]);
    }
    table
}

/// The fixes, and the decision in a sentence.
fn summary(checks: &[Check], decision: &Decision) -> String {
    let mut text = String::new();
    for (at, check) in checks.iter().enumerate() {
        let Some(fix) = &check.fix else { continue };
        // One fix may mend several things: it is said once, for all of them.
        if checks[..at].iter().any(|earlier| earlier.fix.as_ref() == Some(fix)) {
            continue;
        }
        let mended: Vec<&str> =
            checks.iter().filter(|other| other.fix.as_ref() == Some(fix)).map(|other| other.check).collect();
        text.push_str(&format!("\n{}:\n  {}\n", mended.join(", "), fix.replace('\n', "\n  ")));
    }
    text.push_str(&match decision {
        Decision::BareHost => "\nInstances can run on this machine itself.\n".to_owned(),
        Decision::VirtualHost(why) => {
            format!("\nInstances need the virtual host here (scripts/virtual-host up): {why}.\n")
        }
        Decision::Refuse(why) => format!("\nInstances cannot run here: {why}.\n"),
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use report::Remedies;

    #[test]
    fn every_fix_is_shown_below_the_table() {
        let (findings, remedies) =
            (decision::tests::good(), Remedies { programs: vec!["ssh".to_owned()], ..Remedies::default() });
        let findings = decision::Findings { tun: false, nft: false, ..findings };
        let decision = decide(&findings);
        let checks = report::checks(&findings, &remedies);
        let text = summary(&checks, &decision);
        assert!(text.contains("modprobe tun") && text.contains("nftables"), "{text}");
        assert!(text.contains("scripts/virtual-host up"), "{text}");
        insta::assert_snapshot!(table(&checks).render_within(None, false).0 + &text);
    }
}
