//! Runs the `console` blocks of the pages.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::lesson::{self, Section};
use roost_e2e::{Rig, Tenant};
use std::process::Command;

/// A shell as the page's reader has it: in a directory of its own, with the programs and the
/// administrator's profile.
fn shell(rig: &Rig, folder: &std::path::Path) -> Command {
    // A command that waits for ever is a failure, too.
    let mut command = Command::new("timeout");
    command.args(["200", "bash"]);
    let path = std::env::var("PATH").unwrap_or_default();
    command
        .current_dir(folder)
        .env("PATH", format!("{}:{path}", rig.bin.display()))
        .env("ROOST_CONFIG", &rig.config)
        .env("HOST", rig.host.join(" "))
        .env("UNITS", &rig.units);
    command
}

/// The sections of a page with commands, and a rig with the images that the pages name.
fn page(rig: &Rig, name: &str) -> Vec<Section> {
    let tiny = rig.images["tiny-fast"].to_str().unwrap();
    rig.admin(&["image", "import", tiny, "--name", "tiny"]).ok();
    let page = std::fs::read_to_string(rig.checkout.join(name)).unwrap();
    lesson::sections(&page)
}

/// Types each section. The error names every section whose output differs from the page.
fn type_all(rig: &Rig, sections: &[Section]) -> Result<(), String> {
    let folder = std::env::temp_dir().join(format!("roost-e2e-lessons-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let mut wrong = Vec::new();
    for section in sections {
        let began = std::time::Instant::now();
        let told = lesson::run(section, &mut shell(rig, &folder));
        println!("{}: {} s, {told:?}", section.heading, began.elapsed().as_secs());
        wrong.extend(told.err());
    }
    std::fs::remove_dir_all(&folder).unwrap();
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n\n")) }
}

#[test]
#[ignore = "slow: seven lessons take minutes; scripts/test --full runs it"]
fn each_lesson_of_teach_shows_what_it_says() {
    let rig = Rig::get();
    let sections = page(&rig, "docs/teach.md");
    assert_eq!(sections.len(), 8, "the preparation and seven lessons");
    // No instance of a section survives it, however it ends.
    let _tenants = ["anna", "ben"].map(|name| Tenant { rig: &rig, profile: name.to_owned() });
    let (setup, lessons) = sections.split_first().unwrap();
    let whole: Vec<Section> = lessons
        .iter()
        .map(|one| Section {
            heading: one.heading.clone(),
            steps: [setup.steps.clone(), one.steps.clone()].concat(),
        })
        .collect();
    type_all(&rig, &whole).unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[test]
fn the_examples_of_the_other_pages_show_what_they_say() {
    let rig = Rig::get();
    let mut wrong = Vec::new();
    for name in ["docs/launch.md", "docs/operate.md", "docs/network.md", "docs/bill.md"] {
        let sections = page(&rig, name);
        assert!(!sections.is_empty(), "{name} has something to type");
        wrong.extend(type_all(&rig, &sections).err().map(|told| format!("{name}: {told}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}
