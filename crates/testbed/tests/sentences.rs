//! Checks the options of scripts and daemons that pages name, and the files that scripts name. The
//! CLI's crate checks the commands of `roost`.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_testbed::repository_root;
use std::fs;
use std::path::{Path, PathBuf};

/// The folder or file whose source names every option of a program.
fn source_of(program: &str) -> Option<PathBuf> {
    let source = match program {
        "roost-agent" => "crates/agent/src",
        "roost-controller" => "crates/controller/src",
        "roost-vmm" => "crates/vmm/src",
        "scripts/virtual-host" => "crates/testbed/src/bin",
        script if script.starts_with("scripts/") || script.starts_with("guest-images/") => script,
        _ => return None,
    };
    Some(repository_root().join(source))
}

fn text_of(path: &Path) -> String {
    if !path.is_dir() {
        return fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    let mut files: Vec<PathBuf> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| text_of(file)).collect()
}

/// The pages that tell a reader what to type: README, `docs/` and `guest-images/`.
fn pages() -> Vec<PathBuf> {
    let root = repository_root();
    let mut pages = vec![root.join("README.md"), root.join("guest-images/README.md")];
    for entry in fs::read_dir(root.join("docs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "md") {
            pages.push(path);
        }
    }
    pages.sort();
    pages
}

/// The commands of a page: code spans, and the lines of code blocks without their prompts.
fn commands(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in page.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
        } else if fenced || line.starts_with("    ") {
            found.push(line.trim().trim_start_matches("$ ").to_owned());
        } else {
            found.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
        }
    }
    found
}

/// The options of a command of ours, each with its program. Words after ` -- ` or a pipe belong to
/// other programs.
fn options(command: &str) -> Vec<(String, String)> {
    let words: Vec<&str> = command.split(" #").next().unwrap_or("").split_whitespace().collect();
    let begin = words.iter().position(|word| source_of(word).is_some());
    let Some(begin) = begin else { return Vec::new() };
    let mut found = Vec::new();
    for word in words[begin + 1..].iter().take_while(|word| !["--", "|", "&&", ";", "[--"].contains(word)) {
        let word = word.trim_start_matches('[');
        if let Some(option) = word.strip_prefix("--") {
            let name = option.split(|c: char| c != '-' && !c.is_ascii_alphanumeric()).next().unwrap_or("");
            found.push((words[begin].to_owned(), name.to_owned()));
        }
    }
    found
}

/// Returns true if the source of a program has the option, verbatim or as the clap field of that
/// name.
fn knows(source: &str, option: &str) -> bool {
    let field = option.replace('-', "_");
    source.contains(&format!("--{option}"))
        || source.contains(&format!("{field}:"))
        || source.contains(&format!("\"{option}\""))
        || ["help", "version"].contains(&option)
}

#[test]
fn every_option_that_a_page_names_is_one_of_the_program() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for page in pages() {
        for command in commands(&fs::read_to_string(&page).unwrap()) {
            for (program, option) in options(&command) {
                seen += 1;
                if !knows(&text_of(&source_of(&program).unwrap()), &option) {
                    wrong.push(format!("{}: `{command}`: {program} has no --{option}", page.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen > 30, "the pages were read: {seen} options");
}

#[test]
fn every_file_of_the_checkout_that_a_script_names_is_there() {
    let root = repository_root();
    let mut texts = Vec::new();
    for folder in ["scripts", "scripts/lib"] {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            texts.push(entry.unwrap().path());
        }
    }
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for text in texts.iter().filter(|path| path.is_file()) {
        let content = fs::read_to_string(text).unwrap();
        let of_a_path = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        for word in content.split(|c: char| !of_a_path(c)) {
            let word = word.trim_end_matches(['.', '/']);
            let folder = word.split('/').next().unwrap_or("");
            let is_ours = ["scripts", "docs", "crates", "tests", "guest-images"].contains(&folder)
                && word.contains('/');
            if is_ours {
                seen += 1;
                if !root.join(word).exists() {
                    wrong.push(format!("{}: {word}", text.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen > 60, "the texts were read: {seen} paths");
}

#[test]
fn options_are_found_where_people_read_them() {
    let page = "Use `roost-vmm jail [--key FILE] -- run --all`.\n```sh\n$ scripts/install --image X   # --not this\n```\n";
    let found: Vec<(String, String)> = commands(page).iter().flat_map(|command| options(command)).collect();
    let expected = [("roost-vmm", "key"), ("scripts/install", "image")];
    assert_eq!(found, expected.map(|(program, option)| (program.to_owned(), option.to_owned())));
    assert!(!knows(&text_of(&source_of("scripts/install").unwrap()), "no-such-option"));
}
