//! Images.

use crate::stack::Stack;

#[test]
fn an_import_uploads_once_and_can_be_repeated() {
    let stack = Stack::start();
    let folder = stack.image_folder("tiny", 300);
    let first = stack.roost(&["image", "import", &folder]);
    assert!(first.stderr.contains("root.raw: uploaded"), "{first:?}");
    let id = first.ok();
    let again = stack.roost(&["image", "import", &folder]);
    assert_eq!(again.stderr.matches("there already").count(), 3, "{again:?}");
    assert_eq!(again.ok(), id, "the same image is the same image");

    let listed = stack.json(&["image", "ls"]);
    let [image] = listed["images"].as_array().unwrap().as_slice() else { panic!("one image: {listed}") };
    assert_eq!((&image["name"], &image["public"]), (&"tiny".into(), &true.into()));
    assert_eq!(image["min_volume_gib"], 1);
}

#[test]
fn another_image_of_the_same_name_is_refused_or_takes_its_place() {
    let stack = Stack::start();
    let folder = stack.image_folder("tiny", 10);
    let first = stack.json(&["image", "import", &folder]);
    let folder = stack.image_folder("tiny", 20);
    stack.roost(&["image", "import", &folder]).fails(6, &["InvalidAMIName.Duplicate", "tiny", "--replace"]);
    let second = stack.json(&["image", "import", &folder, "--replace"]);
    assert_ne!(first["image_id"], second["image_id"]);
    let same = stack.json(&["image", "import", &folder, "--replace"]);
    assert_eq!(same["image_id"], second["image_id"], "the same image has its own place already");
    let named = stack.json(&["image", "import", &folder, "--name", "other"]);
    assert_eq!(named["name"], "other");

    stack.roost(&["image", "rm", "tiny"]).ok();
    stack.roost(&["image", "rm", "tiny"]).fails(5, &["InvalidAMIID.NotFound", "tiny"]);
    assert_eq!(stack.json(&["image", "ls"])["images"].as_array().unwrap().len(), 1);
}
