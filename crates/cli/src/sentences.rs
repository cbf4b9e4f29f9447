//! Checks every `roost …` that a page, a help text or a message names against the command line.

use crate::args::Cli;
use clap::{Arg, Command, CommandFactory};
use std::fs;
use std::path::{Path, PathBuf};

/// A piece of text, and its place.
struct Said {
    place: String,
    text: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Every file below a folder with this ending.
fn files(folder: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            files(&path, ending, found);
        } else if path.extension().is_some_and(|end| end == ending) {
            found.push(path);
        }
    }
}

/// Code spans, and whole lines of code blocks.
fn code(place: &str, text: &str) -> Vec<Said> {
    let mut found = Vec::new();
    let mut fenced = false;
    // One paragraph at a time: an unclosed backtick spoils no other paragraph.
    for paragraph in text.split("\n\n") {
        let mut prose = String::new();
        for line in paragraph.lines() {
            fenced ^= line.trim_start().starts_with("```");
            if fenced || line.starts_with("    ") {
                found.push(Said { place: place.to_owned(), text: line.trim().to_owned() });
            } else if !line.trim_start().starts_with("```") {
                prose.push_str(line);
                prose.push(' ');
            }
        }
        let ticked = prose.split('`').skip(1).step_by(2);
        found.extend(ticked.map(|text| Said { place: place.to_owned(), text: text.to_owned() }));
    }
    found
}

/// Code spans of a program's source. A string over several lines is joined, and each line is a
/// paragraph.
fn code_in_source(place: &str, text: &str) -> Vec<Said> {
    let mut joined = String::new();
    for line in text.lines() {
        let line = line.trim_start();
        match line.strip_suffix('\\') {
            Some(goes_on) => joined.push_str(goes_on),
            None => {
                joined.push_str(line);
                joined.push_str("\n\n");
            }
        }
    }
    code(place, &joined.replace("\\n", "\n\n"))
}

/// All texts: pages, the programs' sources with their messages, and every help text.
fn all() -> Vec<Said> {
    let mut said = Vec::new();
    let mut pages = vec![root().join("README.md"), root().join("guest-images/README.md")];
    files(&root().join("docs"), "md", &mut pages);
    for page in pages {
        said.extend(code(&page.display().to_string(), &fs::read_to_string(&page).unwrap()));
    }
    let mut sources = Vec::new();
    for room in ["cli", "controller", "agent", "types"] {
        files(&root().join("crates").join(room).join("src"), "rs", &mut sources);
    }
    for source in sources.iter().filter(|path| !path.ends_with("sentences.rs")) {
        said.extend(code_in_source(&source.display().to_string(), &fs::read_to_string(source).unwrap()));
    }
    let mut commands = vec![Cli::command()];
    while let Some(mut command) = commands.pop() {
        commands.extend(command.get_subcommands().cloned());
        let help = command.render_long_help().to_string();
        said.extend(code(&format!("help of {}", command.get_name()), &help.replace('\n', "\n\n")));
    }
    said
}

fn option<'a>(commands: &'a [Command], word: &str) -> Option<&'a Arg> {
    let name = word.split('=').next().unwrap_or_default();
    let here = commands.len() - 1;
    commands
        .iter()
        .enumerate()
        .flat_map(|(at, command)| command.get_arguments().map(move |arg| (at, arg)))
        .find_map(|(at, arg)| {
            let is_it = name.strip_prefix("--").is_some_and(|long| arg.get_long() == Some(long))
                || name.strip_prefix('-').is_some_and(|short| {
                    short.len() == 1 && arg.get_short().is_some_and(|letter| short.starts_with(letter))
                });
            (is_it && (at == here || arg.is_global_set())).then_some(arg)
        })
}

/// Returns the fault of the words after `roost`, if there is one.
fn fault(words: &[&str]) -> Option<String> {
    let mut path = vec![Cli::command()];
    let mut words = words.iter().copied();
    while let Some(word) = words.next() {
        let here = path.last().unwrap().clone();
        if word == "--" {
            return None;
        }
        if matches!(word, "--help" | "-h" | "--version" | "-V" | "…" | "help") {
            continue;
        }
        if word.starts_with('-') && word != "-" {
            let Some(arg) = option(&path, word) else {
                return Some(format!("{} has no option {word}", here.get_name()));
            };
            if arg.get_action().takes_values() && !word.contains('=') {
                words.next();
            }
        } else if here.has_subcommands() {
            let known = here.find_subcommand(word).cloned();
            match known {
                Some(next) => path.push(next),
                // A placeholder, such as COMMAND.
                None if word.chars().any(char::is_uppercase) => return None,
                // The command has arguments of its own beside subcommands.
                None if !here.is_subcommand_required_set() => {}
                None => return Some(format!("{} has no command {word}", here.get_name())),
            }
        }
    }
    None
}

/// The commands of a line of shell, each as words. A placeholder stays a word.
fn commands(line: &str) -> Vec<Vec<String>> {
    let line = line.split(" #").next().unwrap_or_default();
    line.replace("$(", " ; ")
        .replace(" | ", " ; ")
        .split([';', ')'])
        .flat_map(|part| part.split("&&"))
        .map(|part| {
            part.replace(['[', ']', '"', '\''], " ")
                .split_whitespace()
                .map(|word| word.trim_end_matches([',', ':']).to_owned())
                .skip_while(|word| word == "sudo" || word == "$" || word.contains('='))
                .collect()
        })
        .collect()
}

#[test]
fn every_command_and_option_that_is_named_exists() {
    let mut seen = 0;
    let mut faults = Vec::new();
    for said in all() {
        for words in commands(&said.text) {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let Some((&"roost", rest)) = words.split_first() else { continue };
            // "roost" alone, or in a sentence of a code block.
            seen += 1;
            if let Some(fault) = fault(rest) {
                faults.push(format!("{}: `{}`: {fault}", said.place, said.text));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(seen > 80, "the texts name {seen} commands only: were they all read?");
}

#[test]
fn every_file_of_this_repository_that_is_named_exists() {
    let mut seen = 0;
    let mut missing = Vec::new();
    for said in all() {
        for word in said.text.split_whitespace() {
            let word = word.trim_end_matches(['.', ',', ':', ';', ')']).trim_start_matches("./");
            let plain = word.chars().all(|letter| letter.is_ascii_alphanumeric() || "/._-".contains(letter));
            let inside = ["scripts/", "docs/", "crates/", "guest-images/", "tests/"].iter();
            if !plain || !inside.clone().any(|folder| word.starts_with(folder) && word != *folder) {
                continue;
            }
            seen += 1;
            if !root().join(word).exists() {
                missing.push(format!("{}: {word}", said.place));
            }
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
    assert!(seen > 30, "the texts name {seen} files only: were they all read?");
}

#[test]
fn a_command_that_does_not_exist_is_found() {
    let fault_of = |line: &str| {
        let found = commands(line);
        found
            .iter()
            .filter(|words| words.first().is_some_and(|word| word == "roost"))
            .find_map(|words| fault(&words[1..].iter().map(String::as_str).collect::<Vec<_>>()))
    };
    for good in [
        "roost launch --type t3.micro --image debian-12 --wait && roost ssh web -- --anything",
        "sudo roost doctor --vmm PATH",
        "roost --profile alice key ls   # and roost nonsense",
        "roost help COMMAND",
        "roost configure --from admin.json",
        "ssh-keygen -y -f FILE | roost key import NAME -",
    ] {
        assert_eq!(fault_of(good), None, "{good}");
    }
    for bad in
        ["roost lunch", "roost key lst", "roost ls --wait", "x | roost key import --file x", "roost stop -x"]
    {
        assert!(fault_of(bad).is_some(), "{bad}");
    }
}
